"""Runs mlx-lm's models with our layers, through `load` or within mlx-lm itself."""

import codecs
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import remember_source
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.measured import measure_inference
from mlx_dora.adapters.model_view import (
    check_loaded,
    gated_loader,
    headers_of,
    model_view,
)
from mlx_dora.adapters.origins import Origins
from mlx_dora.adapters.tensor import dividing_loader
from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign
from mlx_dora.io.gate import check_dtypes
from mlx_dora.io.header import TensorInfo
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
    """Load a model and its tokenizer like `mlx_lm.load`, with our layers.

    Args:
        model: A local model folder, or a Hub id.
        adapter_path: An adapter folder, ours or mlx-lm's, to attach to the model.
        lazy: Read tensors when they are first used.
        tokenizer_config: Additional settings for the tokenizer.
        model_config: Additional settings for the model.
        revision: Branch, tag or commit, for a Hub id.
        trust_remote_code: Allow Python code in the model's folder to run.
        check_base: Refuse an adapter that was trained on a different model.

    Returns:
        The model, in eval mode, and mlx-lm's tokenizer wrapper.

    Raises:
        DoRAError: If the model does not exist or cannot be loaded, or the adapter does
            not fit.
    """
    return load_with_config(
        model,
        adapter_path,
        lazy=lazy,
        tokenizer_config=tokenizer_config,
        model_config=model_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
        check_base=check_base,
    )[:2]


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
    """Like `load`, but also return the model's config as mlx-lm reads it."""
    # Check the adapter before the model, which may take minutes to load.
    adapter = None if adapter_path is None else read_adapter(adapter_path)
    folder, infos = checked_folder(model, revision=revision)
    origins = Origins(infos) if lazy else None
    from mlx_lm.utils import load as host_load

    settings = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    with model_view(folder, infos, origins) as seen, foreign(model):
        loaded, tokenizer, config = host_load(  # pyright: ignore[reportAssignmentType]
            str(seen),
            tokenizer_config=settings,
            model_config=dict(model_config or {}),
            lazy=True,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
        # Some settings are read only on use. Building the graph reveals shapes that do
        # not match, without computing anything.
        tokenizer.encode("a")
        loaded(mx.array([[0, 0]]))
    check_loaded(folder, infos, loaded)
    remember_source(loaded, str(model))
    if origins is not None:
        origins.keep(loaded)
    if not lazy:
        mx.eval(loaded.parameters())
    if adapter is not None:
        name = str(adapter_path)
        attach_adapter(loaded, adapter, check_base=check_base, name=name)
        measure_inference(loaded)
        loaded.eval()
    return loaded, tokenizer, config


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return mlx-lm's tokenizer of a model, without the model."""
    folder, infos = checked_folder(model)
    from mlx_lm.utils import load_tokenizer as host_load

    ends = read_object(folder / "config.json").get("eos_token_id")
    settings = {"trust_remote_code": trust_remote_code}
    with model_view(folder, infos) as seen, foreign(model):
        tokenizer = host_load(seen, settings, eos_token_ids=ends)
        tokenizer.encode("a")
    return tokenizer


def load_lazily(model: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Return a model without its tokenizer; no tensor is read yet."""
    folder, infos = checked_folder(model)
    origins = Origins(infos)
    from mlx_lm.utils import load_model

    with model_view(folder, infos, origins) as seen, foreign(model):
        loaded, _ = load_model(seen, lazy=True, trust_remote_code=trust_remote_code)
    check_loaded(folder, infos, loaded)
    origins.keep(loaded)
    return loaded


def model_folder(model: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model; download it from the Hub if necessary.

    Raises:
        DoRAError: If there is no such model, or its files are not those of a model.
    """
    return checked_folder(model, revision=revision)[0]


def checked_folder(
    model: str | Path, *, revision: str | None = None
) -> tuple[Path, dict[str, TensorInfo]]:
    """Return `model_folder`, and the checked headers of its weight files."""
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
    infos = headers_of(folder)
    check_dtypes(folder, infos, host_unpacks=True)
    return folder, infos


def _fetch(model: str, revision: str | None) -> Path:
    parts = model.split("/")
    is_hub_id = len(parts) in (1, 2) and all(p and p not in (".", "..") for p in parts)
    if not is_hub_id or model.startswith("~"):
        raise DoRAError(f"there is no model folder {model}.")
    from mlx_lm.utils import _download

    try:
        return Path(_download(model, revision=revision))
    # huggingface_hub raises one of these for a bad id, a missing or private repository,
    # a missing network, or offline mode.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DoRAError(
            f"there is no folder {model}, and the Hugging Face Hub gave no model of "
            f"that name ({type(error).__name__}: {reason:.160}); give a local model "
            "folder, or check the name and the connection."
        ) from error


def load_adapters(model: nn.Module, adapter_path: str | Path) -> nn.Module:
    """Replace mlx-lm's function of this name; checks strictly and uses our layers."""
    attach_adapter(model, read_adapter(adapter_path), name=str(adapter_path))
    measure_inference(model)
    return model


def use_in_mlx_lm() -> "Hosting":
    """Make mlx-lm use our DoRA layers and our strict loader.

    This affects `load(adapter_path=)`, `linear_to_lora_layers(use_dora=True)`, the
    command line, server and generate. As a context manager, it restores mlx-lm at the
    end::

        use_in_mlx_lm()  # permanently

        with use_in_mlx_lm():
            model, tokenizer = mlx_lm.load(path, adapter_path=adapter)
    """
    return Hosting()


class Hosting:
    """Context manager returned by `use_in_mlx_lm`; restores mlx-lm on exit.

    Models loaded meanwhile keep our layers.

    Args:
        group: Processes that divide every model that mlx-lm loads, for tensor
            parallelism; None for a model in a single process.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        dora = importlib.import_module("mlx_lm.tuner.dora")
        tuner = importlib.import_module("mlx_lm.tuner.utils")
        utils = importlib.import_module("mlx_lm.utils")
        self._swaps: list[tuple[Any, Any]] = [
            (dora.DoRALinear, DoRALinear),
            (dora.DoRAEmbedding, DoRAEmbedding),
            (tuner.load_adapters, load_adapters),
            (utils.load_model, _loader(utils.load_model, group)),
        ]
        # If our replacements are active already, there is nothing to do or undo.
        self._swaps = [
            (theirs, ours) for theirs, ours in self._swaps if theirs is not ours
        ]
        _swap(self._swaps)

    def __enter__(self) -> "Hosting":
        return self

    def __exit__(self, *_: object) -> None:
        # Also restores modules that were imported meanwhile and hold our replacements.
        _swap([(ours, theirs) for theirs, ours in self._swaps])


def _loader(own: Any, group: mx.distributed.Group | None) -> Any:
    gated = gated_loader(own)
    return gated if group is None else dividing_loader(gated, group)


def _swap(pairs: list[tuple[Any, Any]]) -> None:
    """Replace objects in modules of mlx_lm that hold them under their own names."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "mlx_lm" or not isinstance(module, ModuleType):
            continue
        for old, new in pairs:
            if vars(module).get(old.__name__) is old:
                setattr(module, old.__name__, new)
