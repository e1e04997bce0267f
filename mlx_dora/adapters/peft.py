"""Adapters from and to Hugging Face PEFT: DoRA and LoRA on linear layers.

The formats differ in names, in the transposition of A and B, and in the multiplier,
which PEFT writes as alpha / r. What only ours holds (the scale to the last bit, the
base's fingerprint, the training summary) travels in the metadata of PEFT's tensor file,
which PEFT does not read.
"""

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import (
    LEAVES,
    Adapter,
    BaseModel,
    adapter_problems,
    listed,
)
from mlx_dora.adapters.attach import fit_problems
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import CONFIG_NAME, load_adapter
from mlx_dora.adapters.fingerprint import base_tensors, fingerprint
from mlx_dora.adapters.format import config_json, parse_config
from mlx_dora.adapters.keys import natural_order, near_names
from mlx_dora.adapters.peft_config import (
    PeftConfig,
    peft_config_json,
    read_peft_config,
)
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text
from mlx_dora.io.foreign import foreign
from mlx_dora.io.header import read_header
from mlx_dora.io.json import parse

PEFT_TENSORS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_NAMES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
_LEAF = re.compile(
    r"(?P<path>.+)\.(?:(?P<lora_a>lora_A\.weight)|(?P<lora_b>lora_B\.weight)"
    r"|(?P<m>lora_magnitude_vector(?:\.weight)?))"
)
_METADATA_KEY = "mlx_dora"
_EMBEDDINGS = (
    "PEFT's magnitude runs along the other axis, and its adapter leaves a tied head "
    "alone"
)
_LINEARS = (nn.Linear, nn.QuantizedLinear)
# What transformers and mlx-lm put around the same blocks.
_CONTAINERS = {"model", "language_model", "text_model", "transformer", "backbone"}
# Scales this close are one: s·r/r need not give s back.
_SAME_SCALE = 1e-12

logger = logging.getLogger(__name__)


def to_peft(
    adapter: Adapter | str | Path,
    path: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a folder that PEFT loads, complete or not at all.

    Module paths are written as MLX has them, which for the models of mlx-lm are mostly
    those of transformers. `from_peft` gives the adapter back bit for bit.

    Args:
        adapter: An `Adapter`, or the folder of one.
        path: The folder to make.
        base_model_name_or_path: What PEFT is told of the base; what the adapter
            recorded if None.
        overwrite: Replace an existing folder.

    Raises:
        DoRAError: If the adapter holds what PEFT cannot express: embeddings, experts,
            full fine-tuning (all by name); or `path` exists.
    """
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    problems = adapter_problems(adapter) or list(_not_in_peft(adapter))
    if problems:
        raise DoRAError(f"the adapter cannot go to PEFT: {'; '.join(problems)}.")
    zero = [k[:-2] for k, v in adapter.tensors.items() if _is_zero_magnitude(k, v)]
    for problem in listed("PEFT computes NaN where a row of the base is zero:", zero):
        logger.warning("%s", problem)
    tensors = {}
    for name, value in adapter.tensors.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{_PREFIX}{module}.{_NAMES[leaf]}"] = value.astype(mx.float32).T
    config = peft_config_json(adapter, base_model_name_or_path or adapter.base.model)
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(config_json(adapter))}
    with atomic_directory(path, overwrite=overwrite) as folder:
        write_tensors(folder / PEFT_TENSORS_NAME, tensors, metadata)
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))


def from_peft(path: str | Path, model: nn.Module | None = None) -> Adapter:
    """Read a LoRA or DoRA adapter that PEFT saved.

    Scales that differ by module are folded into ``lora_b``.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base in MLX. With it, PEFT's module names are matched to the model's
            (whose paths may have other first parts), ``target_modules`` is resolved
            against it, shapes are checked, and its fingerprint is recorded. Without it,
            the names are taken as they are, and `attach_adapter` checks them later.

    Raises:
        DoRAError: If the folder is not in order, or the adapter is no plain LoRA or
            DoRA on linear layers; one message with all problems by name.
    """
    config, file = _files_of(Path(path))
    raw, metadata = _read_tensors(file)
    copies = {n: raw.pop(n) for n in list(raw) if _is_base_weight(n)}
    tensors, problems = _our_names(raw)
    problems += _copy_problems(copies, model)
    paths = sorted({n.rpartition(".")[0] for n in tensors}, key=natural_order)
    unnamed = [path for path in paths if not config.targets(path)]
    problems += listed("tensors of modules outside target_modules:", unnamed)
    names = {path: path for path in paths}
    if model is not None:
        names, unmatched = _match_names(model, config, paths)
        problems += unmatched
    if problems:
        raise DoRAError(f"{path}: {'; '.join(problems)}.")
    adapter = _as_adapter(config, tensors, names, metadata.get(_METADATA_KEY))
    problems = adapter_problems(adapter)
    if model is not None:
        adapter = replace(
            adapter, base=replace(adapter.base, fingerprint=fingerprint(model))
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


def _read_tensors(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    if not read_header(file):
        return {}, {}
    with foreign(file):
        loaded = mx.load(str(file), return_metadata=True)
    return cast(tuple[dict[str, mx.array], dict[str, str]], loaded)


def _is_base_weight(name: str) -> bool:
    """Whether PEFT saved the base's own weight along, as it does with a head."""
    return name.endswith(".weight") and "lora_" not in name


def _copy_problems(copies: dict[str, mx.array], model: nn.Module | None) -> list[str]:
    """A copy of what the base has anyway can go; a trained or resized one cannot."""
    weights = {} if model is None else base_tensors(model)
    differing = []
    for name, copy in copies.items():
        path = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        own = weights.get(path)
        if own is None or not mx.array_equal(own, copy.astype(own.dtype)):
            differing.append(name)
    what = "weights of the base that differ from the model's:"
    if model is None:
        what = "weights of the base (give the model, to compare them with its own):"
    return listed(what, differing)


def _our_names(raw: dict[str, mx.array]) -> tuple[dict[str, mx.array], list[str]]:
    """PEFT's tensors in our names and layout, float32; and those that have none."""
    tensors: dict[str, mx.array] = {}
    strange: dict[str, list[str]] = {}
    for name in sorted(raw, key=natural_order):
        found = _LEAF.fullmatch(name.removeprefix(_PREFIX))
        if found is None:
            strange.setdefault(_what_is(name), []).append(name)
        elif raw[name].ndim > 2:
            strange.setdefault("convolutions do not convert:", []).append(name)
        else:
            leaf = next(leaf for leaf in _NAMES if found[leaf])
            value = raw[name].astype(mx.float32)
            tensors[f"{found['path']}.{leaf}"] = mx.contiguous(value.T)
    return tensors, [p for what, names in strange.items() for p in listed(what, names)]


def _what_is(name: str) -> str:
    if "lora_embedding_" in name:
        return f"adapters of embeddings do not convert ({_EMBEDDINGS}):"
    return "tensors that are not those of a LoRA or DoRA adapter:"


def _match_names(
    model: nn.Module, config: PeftConfig, paths: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """PEFT's path of each module to the model's, and what stands against it."""
    modules = {path: module for path, module in model.named_modules() if path}
    inside: dict[str, list[str]] = {}
    for path in modules:
        inside.setdefault(_within_containers(path), []).append(path)
    names: dict[str, str] = {}
    problems = []
    for path in paths:
        found = [path]
        if path not in modules:
            found = inside.get(_within_containers(path), [])
        if len(found) != 1:
            what = "no module" if not found else f"{len(found)} modules"
            hint = "" if found else near_names(path, modules)
            problems.append(f"{what} of the model can be {path}{hint}")
        elif not isinstance(modules[found[0]], _LINEARS):
            kind = type(modules[found[0]]).__name__
            problems.append(f"{found[0]} is of class {kind}, not a linear layer")
        else:
            names[path] = found[0]
    if problems or not config.names_targets:
        return names, problems
    without = [
        path
        for path, module in modules.items()
        if isinstance(module, _LINEARS)
        and path not in names.values()
        and config.targets(path)
    ]
    return names, listed("target_modules names what has no tensors:", without)


def _within_containers(path: str) -> str:
    """The path without the first parts that only wrap a language model."""
    parts = path.split(".")
    start = next((i for i, p in enumerate(parts) if p not in _CONTAINERS), 0)
    return ".".join(parts[start:])


def _as_adapter(
    config: PeftConfig,
    tensors: dict[str, mx.array],
    names: dict[str, str],
    metadata: str | None,
) -> Adapter:
    """The adapter under the model's names, with one scale."""
    ranks = {new: config.rank_of(old) for old, new in names.items()}
    scales = {new: config.scale_of(old) for old, new in names.items()}
    scale = max(scales.values(), key=abs, default=1.0)
    ours = None if metadata is None else _remembered(metadata)
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
        num_layers=-1 if ours is None else ours.config.num_layers,
        rank_pattern=ranks if len(set(ranks.values())) > 1 else None,
    )
    base = BaseModel(model=config.base_model_name_or_path)
    return Adapter(
        config=dora,
        tensors=renamed,
        base=base if ours is None else ours.base,
        fine_tune_type="dora" if config.use_dora else "lora",
        training=None if ours is None else ours.training,
    )


def _remembered(metadata: str) -> Adapter:
    """What `to_peft` wrote beside the tensors, as an adapter without any."""
    content = parse(metadata, f"the metadata {_METADATA_KEY!r}")
    if not isinstance(content, dict):
        raise DoRAError(f"the metadata {_METADATA_KEY!r} must be a JSON object.")
    return parse_config(content)


def _is_same(scale: float, other: float) -> bool:
    return math.isclose(scale, other, rel_tol=_SAME_SCALE)


def _is_zero_magnitude(name: str, value: mx.array) -> bool:
    return name.endswith(".m") and bool(mx.any(value == 0))


def _not_in_peft(adapter: Adapter) -> Iterable[str]:
    """What of an adapter PEFT cannot express, by name."""
    if adapter.fine_tune_type == "full":
        yield "it is a full fine-tuning, not a DoRA or LoRA adapter"
        return
    experts, embeddings = [], []
    for path in adapter.paths:
        parts = {leaf: adapter.tensors[f"{path}.{leaf}"] for leaf in LEAVES["lora"]}
        if any(value.ndim != 2 for value in parts.values()):
            experts.append(path)
        elif _is_embedding(adapter, path):
            embeddings.append(path)
    yield from listed(
        "PEFT has no adapter like ours for experts or heads of latent attention:",
        experts,
    )
    yield from listed(
        f"adapters of embeddings do not convert ({_EMBEDDINGS}):", embeddings
    )


def _is_embedding(adapter: Adapter, path: str) -> bool:
    """Told by the magnitude's length, one a token, or by the usual names."""
    magnitude = adapter.tensors.get(f"{path}.m")
    if magnitude is not None:
        return magnitude.shape != adapter.tensors[f"{path}.lora_b"].shape[1:]
    name = path.rpartition(".")[2]
    return "embed" in name or name in ("wte", "wpe")
