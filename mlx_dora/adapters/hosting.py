"""mlx-lm's models on our layers: `load`, and mlx-lm itself made to use them."""

import codecs
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.model_view import (
    check_loaded,
    gated_loader,
    headers_of,
    model_view,
)
from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign
from mlx_dora.io.gate import check_dtypes
from mlx_dora.io.json import read_object
from mlx_dora.layers import DoRAEmbedding, DoRALinear


def load(
    model: str | Path,
    adapter_path: str | Path | None = None,
    *,
    lazy: bool = False,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check_base: bool = True,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer as `mlx_lm.load` does, with our layers.

    Args:
        model: A local model folder, or a Hub id.
        adapter_path: An adapter folder, ours or mlx-lm's, to put onto it.
        lazy: Read tensors when they are first used.
        tokenizer_config: More settings for the tokenizer.
        model_config: More settings for the model.
        revision: Branch, tag or commit, for a Hub id.
        trust_remote_code: Run Python code that the model's folder brings along.
        check_base: Refuse an adapter that was trained on another model.

    Returns:
        The model, in eval mode, and mlx-lm's tokenizer wrapper.

    Raises:
        DoRAError: If there is no such model, it cannot be loaded, or the adapter does
            not fit.
    """
    loaded, tokenizer, _ = load_with_config(
        model,
        adapter_path,
        lazy=lazy,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
        check_base=check_base,
    )
    return loaded, tokenizer


def load_with_config(
    model: str | Path,
    adapter_path: str | Path | None = None,
    *,
    lazy: bool = False,
    tokenizer_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check_base: bool = True,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """`load`, returning the model's config as mlx-lm understands it too."""
    # Before the model, which may take minutes to load.
    adapter = None if adapter_path is None else read_adapter(adapter_path)
    folder = model_folder(model, revision=revision)
    from mlx_lm.utils import load as host_load

    settings = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    with model_view(folder) as seen, foreign(model):
        loaded, tokenizer, config = host_load(  # pyright: ignore[reportAssignmentType]
            str(seen),
            tokenizer_config=settings,
            model_config=dict(model_config or {}),
            lazy=True,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
        # Some settings are looked at only when they are used. Shapes that do not fit
        # together show when the graph is made; nothing is computed.
        tokenizer.encode("a")
        loaded(mx.array([[0, 0]]))
    check_loaded(folder, loaded)
    if not lazy:
        mx.eval(loaded.parameters())
    if adapter is not None:
        name = str(adapter_path)
        attach_adapter(loaded, adapter, check_base=check_base, name=name)
        loaded.eval()
    return loaded, tokenizer, config


def load_lazily(model: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Return a model alone, without its tokenizer; no tensor is read yet."""
    folder = model_folder(model)
    from mlx_lm.utils import load_model

    with model_view(folder) as seen, foreign(model):
        loaded, _ = load_model(seen, lazy=True, trust_remote_code=trust_remote_code)
    check_loaded(folder, loaded)
    return loaded


def model_folder(model: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model, fetched from the Hub if need be.

    Raises:
        DoRAError: If there is none, or its files are not those of a model; one line
            that says what to do.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = _fetch(str(model), revision)
    if not folder.is_dir():
        raise DoRAError(f"{model} is a file; give the model's folder.")
    config = folder / "config.json"
    if not config.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = " It is an adapter: give its base as the model."
        raise DoRAError(f"{model} has no config.json: not a model folder.{hint}")
    read_object(config)
    if config.read_bytes().startswith(codecs.BOM_UTF8):
        raise DoRAError(
            f"{config} starts with a byte order mark, which mlx-lm cannot read; save "
            "it as plain UTF-8."
        )
    check_dtypes(folder, headers_of(folder), host_unpacks=True)
    return folder


def _fetch(model: str, revision: str | None) -> Path:
    parts = model.split("/")
    is_hub_id = len(parts) in (1, 2) and all(p and p not in (".", "..") for p in parts)
    if not is_hub_id or model.startswith("~"):
        raise DoRAError(f"there is no model folder {model}.")
    from mlx_lm.utils import _download

    try:
        return Path(_download(model, revision=revision))
    # What huggingface_hub raises for a bad id, a missing or closed repository, no
    # network, offline mode: all of one of these two.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DoRAError(
            f"there is no folder {model}, and the Hugging Face Hub gave no model of "
            f"that name ({type(error).__name__}: {reason:.160}); give a local model "
            "folder, or check the name and the connection."
        ) from error


def load_adapters(model: nn.Module, adapter_path: str | Path) -> nn.Module:
    """Stand in for mlx-lm's function of this name: strict, and with our layers."""
    attach_adapter(model, read_adapter(adapter_path), name=str(adapter_path))
    return model


def use_in_mlx_lm() -> "Hosting":
    """Make mlx-lm use our DoRA layers and our strict loader from now on.

    Its `load(adapter_path=)`, `linear_to_lora_layers(use_dora=True)`, command line,
    server and generate then run on them. As a context manager, undoes it at the end::

        use_in_mlx_lm()  # for good

        with use_in_mlx_lm():
            model, tokenizer = mlx_lm.load(path, adapter_path=adapter)
    """
    return Hosting()


class Hosting:
    """What `use_in_mlx_lm` returns; leaving it as a context gives mlx-lm its own back.

    Models loaded meanwhile keep our layers.
    """

    def __init__(self) -> None:
        dora = importlib.import_module("mlx_lm.tuner.dora")
        tuner = importlib.import_module("mlx_lm.tuner.utils")
        utils = importlib.import_module("mlx_lm.utils")
        self._swaps: list[tuple[Any, Any]] = [
            (dora.DoRALinear, DoRALinear),
            (dora.DoRAEmbedding, DoRAEmbedding),
            (tuner.load_adapters, load_adapters),
            (utils.load_model, gated_loader(utils.load_model)),
        ]
        # Nothing to do, and nothing to undo, where ours are in place already.
        self._swaps = [
            (theirs, ours) for theirs, ours in self._swaps if theirs is not ours
        ]
        _swap(self._swaps)

    def __enter__(self) -> "Hosting":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Modules imported meanwhile took ours and get the originals too.
        _swap([(ours, theirs) for theirs, ours in self._swaps])


def _swap(pairs: list[tuple[Any, Any]]) -> None:
    """Replace objects wherever a module of mlx_lm holds them by their own name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "mlx_lm" or not isinstance(module, ModuleType):
            continue
        for old, new in pairs:
            if vars(module).get(old.__name__) is old:
                setattr(module, old.__name__, new)
