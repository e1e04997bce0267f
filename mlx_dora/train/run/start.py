"""Checks the start of a training: existing layers, saved weights, the folder."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import rank_of
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import dora_layers, variants_of
from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import check_dtypes, read_tensors
from mlx_dora.io.header import read_header
from mlx_dora.io.output import Inputs, refuse_inputs
from mlx_dora.layers import DoRALayer, check_adaptable
from mlx_dora.layers.variants.doran_aux import DoRANAux
from mlx_dora.layers.wrap import is_adapted_as
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.checkpoint import FOLDER_NAME as CHECKPOINTS
from mlx_dora.train.run.checkpoint import WEIGHTS_NAME, has_checkpoints
from mlx_dora.train.stepper import B_NAME, is_up_factor

logger = logging.getLogger(__name__)

BEST_NAME = "best"
"""Subfolder of the best adapter so far."""

_LISTED = 5


def check_present(
    model: nn.Module, config: DoRAConfig, present: Sequence[tuple[str, DoRALayer]]
) -> None:
    """Check that a model's DoRA layers are those that a config would make.

    Raises:
        DoRAError: If a layer differs from `config` in kind, rank or scale.
    """
    wanted = variants_of(model, config, [path for path, _ in present])
    for path, layer in present:
        check_adaptable(layer.base, wanted[path])
        if not is_adapted_as(layer, wanted[path]):
            raise DoRAError(
                f"the model's layer {path} is adapted as {layer.kind.name}, the "
                f"config asks for {wanted[path]}."
            )
        if "lora_b" not in layer:  # only a magnitude
            continue
        kind = layer.kind
        rank = rank_of("lora_a", layer.lora_a) // kind.room
        actual = rank, float(layer.scale)
        expected = config.rank_of(path), config.scale_of(path)
        if actual != expected:
            raise DoRAError(
                f"the model's DoRA layer {path} has rank and scale {actual}, the "
                f"config says {expected}."
            )
        if kind.name == DoRANAux.name and kind.room != config.aux_width:
            raise DoRAError(
                f"the model's layer {path} has aux_width {kind.room}, the config "
                f"says {config.aux_width}."
            )
    logger.info("training the %d existing DoRA layers of the model", len(present))


def check_lora_plus(model: nn.Module, ratio: float) -> None:
    """Refuse LoRA+ if no up projection B is trained.

    Raises:
        DoRAError: If `ratio` is not 1 and no trainable parameter is named ``lora_b``.
    """
    if ratio != 1 and not any(map(is_up_factor, trainable_tensors(model))):
        raise DoRAError(
            f"lora_plus_ratio is {ratio}, but no parameter named {B_NAME} is trained."
        )


def trainable_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by name."""
    flat = tree_flatten(model.trainable_parameters())
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def kept_tensors(model: nn.Module) -> dict[str, mx.array]:
    """Tensors of a checkpoint: trainable parameters and a variant's fixed tensors."""
    fixed = {
        f"{path}.{name}": layer[name]
        for path, layer in dora_layers(model)
        for name in layer.kind.fixed
    }
    return {**trainable_tensors(model), **fixed}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the trained weights of an earlier run into a model, all or none.

    Args:
        model: A model made trainable as in the earlier run.
        path: The ``adapters.safetensors`` file, or its folder.

    Raises:
        DoRAError: If names or shapes differ from those of the trainable parameters, or
            a value is not finite.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise DoRAError(f"resume_adapter_file {path} does not exist.")
    infos = read_header(path)
    check_dtypes(path, infos, all_weights=True)
    shapes = {name: info.shape for name, info in infos.items()}
    weights = kept_tensors(model)
    wanted = {name: value.shape for name, value in weights.items()}
    problems = [f"it lacks {name}" for name in wanted if name not in shapes]
    problems += [f"{name} is not trained here" for name in shapes if name not in wanted]
    problems += [
        f"{name} has shape {tuple(shapes[name])}, the model needs {tuple(wanted[name])}"
        for name in wanted
        if name in shapes and tuple(shapes[name]) != tuple(wanted[name])
    ]
    tensors = {} if problems else read_tensors(path, infos=infos)
    problems += [
        f"{name} holds NaN or inf"
        for name, value in tensors.items()
        if not mx.all(mx.isfinite(value))
    ]
    if problems:
        more = len(problems) - _LISTED
        listed = "; ".join(problems[:_LISTED])
        raise DoRAError(f"{path}: {listed}{f'; and {more} more' if more > 0 else ''}.")
    model.load_weights(
        [(name, value.astype(weights[name].dtype)) for name, value in tensors.items()],
        strict=False,
    )
    mx.eval(model.trainable_parameters())


def check_folder(path: Path, config: TrainConfig, inputs: Inputs = ()) -> None:
    """Refuse a folder that cannot hold the adapter, or whose adapter would be lost.

    Starting from the folder's own weights or checkpoints allows replacing them.

    Args:
        path: The adapter's folder.
        config: Settings of the training.
        inputs: Files and folders to be read, besides the model and weights that
            `config` names.

    Raises:
        DoRAError: If `path` is a file, the file system's root or the home folder; if it
            is, contains or lies inside an input; if weights to start from would be
            replaced; if it holds an adapter or checkpoints that may not be replaced; or
            if an adapter without checkpoints is to be resumed.
    """
    if path.exists() and path.resolve() == Path.home().resolve():
        raise DoRAError(f"adapter_path {path} is the home folder; choose another.")
    refuse_inputs(path, (config.model, *inputs))
    _refuse_start(path, config)
    if path.exists() and not path.is_dir():
        raise DoRAError(f"adapter_path {path} is a file, not a folder.")
    weights = path / WEIGHTS_NAME
    resumable = has_checkpoints(path)
    if config.overwrite or (config.resume and resumable):
        return
    if config.resume and weights.exists():
        raise DoRAError(
            f"{path} holds an adapter but no checkpoint to resume from; to start from "
            "its weights only, set resume_adapter_file to it."
        )
    if _starts_here(path, config):
        return
    if resumable or weights.exists():
        what = "an adapter" if weights.exists() else "checkpoints of a training"
        ways = "resume it (--resume), choose" if resumable else "choose"
        raise DoRAError(
            f"{path} holds {what} already; {ways} another adapter_path, or set "
            "overwrite (--overwrite) to replace it."
        )


def _starts_here(path: Path, config: TrainConfig) -> bool:
    """Whether the weights to start from are those in the folder itself."""
    if not config.resume_adapter_file:
        return False
    start = Path(config.resume_adapter_file).expanduser().resolve()
    return start in ((path / WEIGHTS_NAME).resolve(), path.resolve())


def _refuse_start(path: Path, config: TrainConfig) -> None:
    """Refuse to replace the weights that a training starts from, except in place."""
    if not config.resume_adapter_file:
        return
    start = Path(config.resume_adapter_file).expanduser()
    if _starts_here(path, config):
        is_replaced = config.overwrite
    else:
        if start.is_dir():
            refuse_inputs(path, (start,))
        replaced = [path / name for name in (WEIGHTS_NAME, CHECKPOINTS, BEST_NAME)]
        is_replaced = any(
            start.resolve().is_relative_to(target.resolve()) for target in replaced
        )
    if is_replaced:
        raise DoRAError(
            f"resume_adapter_file {start} lies in adapter_path {path}, where this "
            "training would replace it; choose another adapter_path, or continue in "
            "place from its adapters.safetensors without overwrite."
        )


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in train mode, and in eval mode afterward."""
    model.train()
    try:
        yield
    finally:
        model.eval()
