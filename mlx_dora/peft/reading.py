"""Reads a folder in PEFT's format as an adapter.

The formats differ in names, in the transposition of A and B, and in the multiplier,
which PEFT writes as alpha / r. Information that only MLX's format holds (the exact
scale, the base's fingerprint, the training summary) is stored in the metadata of PEFT's
tensor file, which PEFT does not read.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter, BaseModel, adapter_problems, listed
from mlx_dora.adapters.attach import fit_problems
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.format import parse_config
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.key_form import form_of_all_blocks, kept_form, with_key_form
from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.adapters.one_save import CONFIG_NAME
from mlx_dora.errors import DoRAError
from mlx_dora.io.gate import read_tensors
from mlx_dora.io.header import read_header_and_metadata
from mlx_dora.io.json import parse
from mlx_dora.peft.classes import ClassNames
from mlx_dora.peft.config import PeftConfig
from mlx_dora.peft.config_file import read_peft_config
from mlx_dora.peft.copies import copy_problems, take_copies
from mlx_dora.peft.modules import ModelModules
from mlx_dora.peft.names import class_of, look_plain, names_of
from mlx_dora.peft.tensors import PEFT_TENSORS_NAME, our_tensors
from mlx_dora.peft.writing import CLASS_KEY, MODULES_KEY, OURS_KEY

# Scales this close count as equal, because s·r/r may differ from s by rounding.
_SAME_SCALE = 1e-12

logger = logging.getLogger(__name__)


def from_peft(path: str | Path, model: nn.Module | str | Path | None = None) -> Adapter:
    """Read a LoRA or DoRA adapter that PEFT saved.

    Scales that differ between modules are folded into ``lora_b``.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base model in MLX, as a loaded model, a local folder or a Hub id. If
            given, PEFT's module names and ``target_modules`` are matched to the model,
            shapes are checked, and the model's fingerprint is recorded. If None, PEFT's
            names are kept (an adapter written by `to_peft` gets its original names),
            and `attach_adapter` checks them later.

    Raises:
        DoRAError: If the folder is invalid, or the adapter is not a plain LoRA or DoRA
            on linear layers; lists all problems by name.
    """
    config, file = _files_of(Path(path))
    if isinstance(model, str | Path):
        model = load_lazily(model)
    raw = read_tensors(file, all_weights=True)
    _, metadata = read_header_and_metadata(file)
    ours = _remembered(metadata, file)
    copies = take_copies(raw)
    tensors, problems = our_tensors(raw)
    paths = sorted({n.rpartition(".")[0] for n in tensors}, key=natural_order)
    unnamed = [path for path in paths if not config.targets(path)]
    problems += listed("tensors of modules outside target_modules:", unnamed)
    if model is None:
        names = _names_as_written(paths, ours, metadata)
        problems += copy_problems(copies, None, str)
    else:
        modules = ModelModules(model)
        if refusal := modules.names.refusal:
            problems.append(f"adapters of {class_of(model)} do not convert ({refusal})")
        problems += copy_problems(copies, model, modules.path_of)
        names, unmatched = modules.match(config, paths)
        problems += unmatched
    if problems:
        raise DoRAError(f"{path}: {'; '.join(problems)}.")
    adapter = _as_adapter(config, tensors, names, ours)
    problems = adapter_problems(adapter)
    if model is not None:
        adapter = replace(
            adapter,
            config=with_key_form(adapter.config, model, adapter.paths),
            base=replace(adapter.base, fingerprint=fingerprint(model)),
        )
        problems += fit_problems(model, adapter)
    if problems:
        raise DoRAError(f"{path}: {'; '.join(problems)}.")
    return adapter


def _files_of(folder: Path) -> tuple[PeftConfig, Path]:
    if not folder.is_dir():
        raise DoRAError(f"{folder} is not a PEFT adapter: there is no such folder.")
    file = folder / PEFT_TENSORS_NAME
    if not file.is_file():
        hint = ""
        if (folder / "adapter_model.bin").is_file():
            hint = (
                " Its adapter_model.bin is a pickle, which can run code and is never "
                "read: save it again with safe_serialization=True."
            )
        raise DoRAError(f"{folder} has no {PEFT_TENSORS_NAME}.{hint}")
    if not (folder / CONFIG_NAME).is_file():
        raise DoRAError(f"{folder} has no {CONFIG_NAME}.")
    return read_peft_config(folder / CONFIG_NAME), file


def _as_adapter(
    config: PeftConfig,
    tensors: dict[str, mx.array],
    names: dict[str, str],
    ours: Adapter | None,
) -> Adapter:
    """Return the adapter with the model's names and a single scale."""
    ranks = {new: config.rank_of(old) for old, new in names.items()}
    scales = {new: config.scale_of(old) for old, new in names.items()}
    scale = max(scales.values(), key=abs, default=1.0)
    if ours is not None and _is_same(ours.config.scale, scale):
        scale = ours.config.scale
    renamed = {}
    for name, value in tensors.items():
        old, _, leaf = name.rpartition(".")
        path = names[old]
        if leaf == "lora_b" and not _is_same(scales[path], scale):
            value = value * (scales[path] / scale)
        renamed[f"{path}.{leaf}"] = value
    dora = DoRAConfig(
        rank=max(ranks.values(), default=config.r),
        scale=scale,
        dropout=config.lora_dropout,
        keys=tuple(sorted(ranks, key=natural_order)) or None,
        rank_pattern=ranks if len(set(ranks.values())) > 1 else None,
    )
    if ours is not None:
        form = kept_form(ours.config, list(dora.keys or ()))
        dora = replace(dora, keys=form.keys or None, num_layers=form.num_layers)
    elif all(theirs == path for theirs, path in names.items()):
        dora = form_of_all_blocks(dora, list(ranks), config.targets)
    base = BaseModel(model=config.base_model_name_or_path)
    return Adapter(
        config=dora,
        tensors=renamed,
        base=base if ours is None else ours.base,
        fine_tune_type="dora" if config.use_dora else "lora",
        training=None if ours is None else ours.training,
    )


def _remembered(metadata: dict[str, str], file: Path) -> Adapter | None:
    """Return what `to_peft` wrote into the metadata, as an adapter without tensors."""
    if OURS_KEY not in metadata:
        return None
    where = f"{file}: the metadata {OURS_KEY!r}"
    content = parse(metadata[OURS_KEY], where)
    if not isinstance(content, dict):
        raise DoRAError(f"{where} must be a JSON object, got {content!r:.60}.")
    return parse_config(content)


def _names_as_written(
    paths: Iterable[str], ours: Adapter | None, metadata: dict[str, str]
) -> dict[str, str]:
    """Map PEFT's paths to the names before `to_peft`; keep all other paths."""
    written = names_of(metadata.get(CLASS_KEY)) or ClassNames()
    ours_paths = () if ours is None else ours.config.keys or ()
    if MODULES_KEY in metadata:
        ours_paths = parse(metadata[MODULES_KEY], f"the metadata {MODULES_KEY!r}")
        if not isinstance(ours_paths, list) or not all(
            isinstance(path, str) for path in ours_paths
        ):
            raise DoRAError(f"the metadata {MODULES_KEY!r} must be a list of names.")
    back = {written.to_transformers(path): path for path in ours_paths}
    names = {path: back.get(path, path) for path in paths}
    unknown = [path for path in names if path not in back]
    if not look_plain(unknown):
        logger.warning(
            "without a model, modules keep their names from PEFT, which may differ "
            "from MLX's: %s",
            shortened(unknown),
        )
    return names


def _is_same(scale: float, other: float) -> bool:
    return math.isclose(scale, other, rel_tol=_SAME_SCALE)
