"""Writes an adapter as a folder in PEFT's format."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import LEAVES, Adapter, adapter_problems, listed
from mlx_dora.adapters.files import load_adapter
from mlx_dora.adapters.format import config_json
from mlx_dora.adapters.keys import shortened
from mlx_dora.adapters.one_save import CONFIG_NAME
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import (
    atomic_directory,
    check_output,
    write_tensors,
    write_text,
)
from mlx_dora.io.output import Inputs
from mlx_dora.peft.classes import PEFT_REFUSES, ClassNames
from mlx_dora.peft.names import (
    class_in_folder,
    class_of,
    look_plain,
    names_of,
)
from mlx_dora.peft.tensors import EMBEDDINGS, PEFT_TENSORS_NAME, peft_name

OURS_KEY = "mlx_dora"
"""Metadata key of the tensor file for our own config of the adapter."""
MODULES_KEY = "mlx_dora_modules"
"""Metadata key of the tensor file for the full paths of the modules in MLX, as JSON."""
CLASS_KEY = "mlx_dora_class"
"""Metadata key of the tensor file for the mlx-lm class whose names were translated."""

logger = logging.getLogger(__name__)


def to_peft(
    adapter: Adapter | str | Path,
    path: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    model: nn.Module | str | Path | None = None,
    overwrite: bool = False,
    inputs: Inputs = (),
) -> None:
    """Write an adapter as a folder that PEFT loads; all or nothing.

    Module paths are written as in transformers. Where they differ from MLX's depends on
    the model's class, which comes from `model` or else from the adapter's recorded base
    if that is a local folder. Warns if transformers' names are unknown. `from_peft`
    restores the adapter exactly.

    Args:
        adapter: An `Adapter`, or an adapter folder.
        path: The folder to create.
        base_model_name_or_path: Name of the base to record for PEFT; if None, the base
            that the adapter records.
        model: The base, as a loaded model or a local folder. Only its class is used.
        overwrite: Replace an existing folder.
        inputs: Files and folders that the output must not replace, contain or lie in.
            `adapter` and `model` are included if they are folders.

    Raises:
        DoRAError: If the adapter contains something that PEFT cannot express:
            embeddings, experts, modules that are not linear layers in transformers, or
            full fine-tuning (all by name); or if `path` exists.
    """
    folders = [item for item in (adapter, model) if isinstance(item, str | Path)]
    inputs = (*folders, *inputs)
    check_output(path, inputs=inputs, overwrite=overwrite)
    if not isinstance(adapter, Adapter):
        adapter = load_adapter(adapter)
    kind = _class(model if model is not None else adapter.base.model)
    names = names_of(kind)
    problems = adapter_problems(adapter) or list(_not_in_peft(adapter, kind))
    if problems:
        raise DoRAError(
            f"the adapter cannot be converted to PEFT: {'; '.join(problems)}."
        )
    _warn_of_zero_rows(adapter)
    _warn_of_refused(adapter, kind)
    if names is None:
        _warn_of_names(adapter, kind)
        names = ClassNames()
    tensors = {}
    for name, value in adapter.tensors.items():
        module, _, leaf = name.rpartition(".")
        theirs = peft_name(names.to_transformers(module), leaf)
        tensors[theirs] = value.astype(mx.float32).T
    base = base_model_name_or_path or adapter.base.model
    config = peft_config_json(adapter, names, base)
    if config["rank_pattern"]:
        logger.warning(
            "ranks or multipliers differ between modules; PEFT reads them, but vLLM "
            "reads one r and one lora_alpha for all and would compute something else."
        )
    metadata = {
        "format": "pt",
        OURS_KEY: json.dumps(config_json(adapter)),
        MODULES_KEY: json.dumps(adapter.paths),
    }
    if kind is not None:
        metadata[CLASS_KEY] = kind
    with atomic_directory(path, inputs=inputs, overwrite=overwrite) as folder:
        write_tensors(folder / PEFT_TENSORS_NAME, tensors, metadata)
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))


def peft_config_json(
    adapter: Adapter, names: ClassNames, base_model: str | None
) -> dict[str, Any]:
    """Return the content of an ``adapter_config.json`` for PEFT."""
    config = adapter.config
    paths = {names.to_transformers(path): path for path in adapter.paths}
    ranks = {theirs: config.rank_of(ours) for theirs, ours in paths.items()}
    alphas = {
        theirs: config.scale_of(ours) * ranks[theirs] for theirs, ours in paths.items()
    }
    rank, alpha = max(ranks.values()), max(alphas.values(), key=abs)
    # PEFT uses the first key that a path ends with, so list all paths, longest first.
    longest_first = sorted(paths, key=len, reverse=True)
    differ = any(r != rank for r in ranks.values())
    differ = differ or any(a != alpha for a in alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "use_dora": adapter.fine_tune_type == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": names.has_conv1d,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(paths),
        "rank_pattern": {p: ranks[p] for p in longest_first} if differ else {},
        "alpha_pattern": {p: alphas[p] for p in longest_first} if differ else {},
    }


def _class(model: nn.Module | str | Path | None) -> str | None:
    if isinstance(model, nn.Module):
        return class_of(model)
    return None if model is None else class_in_folder(model)


def _warn_of_zero_rows(adapter: Adapter) -> None:
    zero = [
        name.removesuffix(".m")
        for name, value in adapter.tensors.items()
        if name.endswith(".m") and bool(mx.any(value == 0))
    ]
    for problem in listed("PEFT computes NaN where a row of the base is zero:", zero):
        logger.warning("%s", problem)


def _warn_of_refused(adapter: Adapter, kind: str | None) -> None:
    refused = PEFT_REFUSES.get(kind or "", ())
    paths = [path for path in adapter.paths if path.rpartition(".")[2] in refused]
    for problem in listed(f"PEFT 0.21 cannot load adapters of {kind} for:", paths):
        logger.warning("%s", problem)


def _warn_of_names(adapter: Adapter, kind: str | None) -> None:
    if kind is None and look_plain(adapter.paths):
        return
    if kind is None:
        reason = "the model's class is not known (give the model)"
    else:
        reason = f"transformers' names for the class {kind} are not known"
    logger.warning(
        "%s: modules are named as in MLX, and PEFT may not find them: %s",
        reason,
        shortened(adapter.paths),
    )


def _not_in_peft(adapter: Adapter, kind: str | None) -> Iterable[str]:
    """Yield what PEFT cannot express in an adapter, by name."""
    if adapter.fine_tune_type == "full":
        yield "it is a full fine-tuning, not a DoRA or LoRA adapter"
        return
    names = names_of(kind) or ClassNames()
    if names.refusal is not None:
        yield f"adapters of {kind} do not convert ({names.refusal})"
        return
    experts, embeddings, missing = [], [], []
    for path in adapter.paths:
        parts = {leaf: adapter.tensors[f"{path}.{leaf}"] for leaf in LEAVES["lora"]}
        if any(value.ndim != 2 for value in parts.values()):
            experts.append(path)
        elif _is_embedding(adapter, path):
            embeddings.append(path)
        elif names_of(kind) is not None and names.is_missing(path):
            missing.append(path)
    yield from listed(
        "PEFT has no such adapter for experts or heads of latent attention:",
        experts,
    )
    yield from listed(
        f"adapters of embeddings do not convert ({EMBEDDINGS}):", embeddings
    )
    yield from listed(
        f"transformers' {kind} has no linear layer for (train without them):", missing
    )


def _is_embedding(adapter: Adapter, path: str) -> bool:
    """Whether a module is an embedding, by its magnitude's length or its name.

    An embedding's magnitude has one entry per token.
    """
    magnitude = adapter.tensors.get(f"{path}.m")
    if magnitude is not None:
        return magnitude.shape != adapter.tensors[f"{path}.lora_b"].shape[1:]
    name = path.rpartition(".")[2]
    return name in ("wte", "wpe") or ("embed" in name and name != "embed_out")
