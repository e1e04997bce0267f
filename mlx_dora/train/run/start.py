"""What a training starts from: adapter layers, a folder, weights of an earlier run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.adapter import rank_of
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.surgery import apply_layers, dora_layers, variants_of
from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import check_dtypes, read_tensors
from mlx_dora.io.header import read_header
from mlx_dora.io.output import Inputs, refuse_inputs
from mlx_dora.layers import check_adaptable
from mlx_dora.layers.variants.doran_aux import DoRANAux
from mlx_dora.layers.wrap import is_adapted_as
from mlx_dora.train.config import FineTuneType, TrainConfig
from mlx_dora.train.run.checkpoint import FOLDER_NAME as CHECKPOINTS
from mlx_dora.train.run.checkpoint import WEIGHTS_NAME, has_checkpoints
from mlx_dora.train.stepper import B_NAME, is_up_factor

logger = logging.getLogger(__name__)

BEST_NAME = "best"
"""The folder of the best adapter so far, in the adapter's folder."""

_LISTED = 5


def make_trainable(
    model: nn.Module, config: DoRAConfig, fine_tune_type: FineTuneType
) -> list[str]:
    """Adapt the model, or take the DoRA layers it has already.

    Returns:
        Paths of what will be trained.

    Raises:
        DoRAError: If nothing would be trained, or the model's DoRA layers are of
            another kind, rank or scale than `config` says, or it asks for a variant of
            something else than DoRA.
    """
    if fine_tune_type != "dora" and not config.is_plain:
        raise DoRAError(
            "variant, init and magnitude_keys are DoRA's; with fine_tune_type "
            f"{fine_tune_type} leave them out."
        )
    present = dora_layers(model) if fine_tune_type == "dora" else []
    if present:
        wanted = variants_of(model, config, [path for path, _ in present])
        for path, layer in present:
            check_adaptable(layer.base, wanted[path])
            if not is_adapted_as(layer, wanted[path]):
                raise DoRAError(
                    f"the model's layer {path} is adapted as {layer.variant}, the "
                    f"config means {wanted[path]}."
                )
            if "lora_b" not in layer:  # the magnitude alone
                continue
            rank = rank_of("lora_a", layer.lora_a) // layer.room
            found = rank, float(layer.scale)
            expected = config.rank_of(path), config.scale_of(path)
            if found != expected:
                raise DoRAError(
                    f"the model's DoRA layer {path} has rank and scale {found}, the "
                    f"config says {expected}."
                )
            if layer.variant == DoRANAux.name and layer.room != config.aux_width:
                raise DoRAError(
                    f"the model's layer {path} has aux_width {layer.room}, the config "
                    f"says {config.aux_width}."
                )
        logger.info("training the %d DoRA layers the model has", len(present))
        return [path for path, _ in present]
    paths = apply_layers(model, config, fine_tune_type)
    if not paths:
        raise DoRAError(
            f"nothing to train: num_layers is {config.num_layers} and no key names a "
            "module outside the blocks."
        )
    return paths


def check_lora_plus(model: nn.Module, ratio: float) -> None:
    """Refuse a learning rate for B's where no B is trained.

    Raises:
        DoRAError: If `ratio` is not 1 and no trainable parameter is called so.
    """
    if ratio != 1 and not any(map(is_up_factor, trainable_tensors(model))):
        raise DoRAError(
            f"lora_plus_ratio is {ratio}, but nothing called {B_NAME} is trained."
        )


def trainable_tensors(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by name."""
    flat = tree_flatten(model.trainable_parameters())
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def kept_tensors(model: nn.Module) -> dict[str, mx.array]:
    """What a checkpoint holds: the trainable parameters, and what a variant fixed."""
    fixed = {
        f"{path}.{name}": layer[name]
        for path, layer in dora_layers(model)
        for name in layer.fixed
    }
    return {**trainable_tensors(model), **fixed}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the trained weights of an earlier run into a model, all of them or none.

    Args:
        model: A model made trainable as it was then.
        path: The ``adapters.safetensors``, or its folder.

    Raises:
        DoRAError: If names or shapes are not those of the trainable parameters, or a
            value is not finite.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise DoRAError(f"resume_adapter_file {path} does not exist.")
    infos = read_header(path)
    check_dtypes(path, infos, all_weights=True)
    found = {name: info.shape for name, info in infos.items()}
    weights = kept_tensors(model)
    wanted = {name: value.shape for name, value in weights.items()}
    problems = [f"it lacks {name}" for name in wanted if name not in found]
    problems += [f"{name} is not trained here" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {tuple(found[name])}, the model needs {tuple(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
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
    """Refuse a folder that cannot take the adapter, or would lose one unasked.

    Going on from the folder's own weights or checkpoints counts as asking.

    Args:
        path: The adapter's folder.
        config: Settings of the training.
        inputs: Files and folders that are read, besides the model and weights that
            `config` names.

    Raises:
        DoRAError: If `path` is a file, the file system's root or the home folder; if
            it is, holds or lies inside an input; if weights to start from would be
            replaced; or if it holds an adapter or checkpoints and they are not to be
            replaced, or an adapter without checkpoints is to be resumed.
    """
    if path.exists() and path.resolve() == Path.home().resolve():
        raise DoRAError(f"adapter_path {path} is the home folder; name another.")
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
            "its weights alone, name it as resume_adapter_file."
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
    """Whether the weights to start from are those that the folder itself holds."""
    if not config.resume_adapter_file:
        return False
    start = Path(config.resume_adapter_file).expanduser().resolve()
    return start in ((path / WEIGHTS_NAME).resolve(), path.resolve())


def _refuse_start(path: Path, config: TrainConfig) -> None:
    """Refuse to replace the weights that a training starts from, unless in place."""
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
            start.resolve().is_relative_to(one.resolve()) for one in replaced
        )
    if is_replaced:
        raise DoRAError(
            f"resume_adapter_file {start} lies in adapter_path {path}, where this "
            "training would replace it; choose another adapter_path, or go on in place "
            "without overwrite from its adapters.safetensors."
        )


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in train mode for a while, and in eval mode afterwards."""
    model.train()
    try:
        yield
    finally:
        model.eval()
