"""Writes a LoRA adapter as a GGUF file that llama.cpp and Ollama load.

llama.cpp multiplies the update by alpha / r of each tensor pair and computes no DoRA
(`plain_lora` makes a LoRA of a DoRA adapter first).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.adapters.adapter import LEAVES, Adapter, adapter_problems, listed
from mlx_dora.errors import DoRAError
from mlx_dora.export.architectures import (
    architecture_of,
    gguf_package,
    head_counts,
    tensor_names,
)
from mlx_dora.export.modelfile import modelfile
from mlx_dora.export.row_order import pairs_order
from mlx_dora.io.atomic import atomic_directory, write_text
from mlx_dora.io.json import read_object
from mlx_dora.io.output import Inputs
from mlx_dora.peft.names import class_in_folder

ADAPTER_NAME = "adapter.gguf"
MODELFILE_NAME = "Modelfile"

_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, kw_only=True)
class GGUFAdapter:
    """What was written.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        tensors: Number of tensors, two for each module.
        has_template: Whether the Modelfile has a template of its own.
    """

    architecture: str
    tensors: int
    has_template: bool


def to_gguf(
    adapter: Adapter,
    path: str | Path,
    *,
    model_folder: str | Path,
    base_gguf: str = "base.gguf",
    overwrite: bool = False,
    inputs: Inputs = (),
) -> GGUFAdapter:
    """Write a folder with ``adapter.gguf`` and a ``Modelfile`` for Ollama.

    Args:
        adapter: A LoRA adapter on linear layers.
        path: The folder to create.
        model_folder: The base in MLX's format. Its config gives the architecture and
            the heads, its tokenizer the template and the stop tokens.
        base_gguf: The base in the Modelfile: a GGUF file or a model of Ollama.
        overwrite: Replace an existing folder.
        inputs: Files and folders that the output must not replace, contain or lie in.

    Raises:
        DoRAError: If the adapter is not a LoRA, llama.cpp has no such module (by name),
            the class of the base is not in the table, or `path` exists.
    """
    names = check_gguf(adapter, model_folder)
    if adapter.fine_tune_type != "lora":
        raise DoRAError(
            f"llama.cpp reads LoRA only, got a {adapter.fine_tune_type} adapter; "
            "convert it with --to gguf --rank R, which makes the nearest LoRA."
        )
    kind, config = _class_and_config(model_folder)
    architecture = architecture_of(kind)
    heads = head_counts(config) if architecture.pairs else {}
    tensors = gguf_tensors(adapter, names, heads)
    text = modelfile(model_folder, base_gguf, adapter=f"./{ADAPTER_NAME}")
    with atomic_directory(path, inputs=inputs, overwrite=overwrite) as folder:
        alpha = _alpha(adapter)
        _write(folder / ADAPTER_NAME, architecture.name, alpha, tensors)
        write_text(folder / MODELFILE_NAME, text.content)
    return GGUFAdapter(
        architecture=architecture.name,
        tensors=len(tensors),
        has_template=text.has_template,
    )


def check_gguf(adapter: Adapter, model_folder: str | Path) -> dict[str, str]:
    """Return llama.cpp's names of the adapted weights, by path.

    The adapter may be DoRA: what is checked holds for the LoRA made of it, too.

    Raises:
        DoRAError: If llama.cpp cannot load an adapter of these modules, by name.
    """
    kind, config = _class_and_config(model_folder)
    architecture = architecture_of(kind)
    problems = adapter_problems(adapter)
    if adapter.fine_tune_type == "full":
        problems.append("it is a full fine-tuning, not a DoRA or LoRA adapter")
    if problems:
        raise DoRAError(f"the adapter does not convert to GGUF: {'; '.join(problems)}.")
    name_of = tensor_names(str(kind), int(config["num_hidden_layers"]))
    by_path = {path: name_of(path) for path in adapter.paths}
    names = {path: name for path, name in by_path.items() if name is not None}
    stacks = [path for path in by_path if adapter.tensors[f"{path}.lora_a"].ndim != 2]
    problems += listed("experts and heads of latent attention do not convert:", stacks)
    embeddings = [path for path, name in names.items() if name == _EMBEDDING]
    problems += listed(
        "adapters of embeddings do not convert (llama.cpp has none for a tied head):",
        embeddings,
    )
    unknown = [path for path in by_path if path not in (*names, *stacks)]
    problems += listed(f"{architecture.name} has no tensor for:", unknown)
    if problems:
        raise DoRAError(f"the adapter does not convert to GGUF: {'; '.join(problems)}.")
    return names


def gguf_tensors(
    adapter: Adapter, names: Mapping[str, str], heads: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Return the tensors by llama.cpp's names: A ``(r, in)`` and B ``(out, r)``.

    Args:
        adapter: A LoRA adapter.
        names: llama.cpp's names of the weights, by path.
        heads: Number of heads by the last name of a module whose rows are reordered.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, name in names.items():
        a, b = (
            adapter.tensors[f"{path}.{leaf}"].astype(mx.float32).T
            for leaf in LEAVES["lora"]
        )
        if count := heads.get(path.rpartition(".")[2]):
            b = pairs_order(b, count)
        # llama.cpp divides alpha by each pair's own rank.
        factor = adapter.config.scale_of(path) * a.shape[0] / (_alpha(adapter) or 1.0)
        tensors[f"{name}.lora_a"] = np.array(mx.contiguous(a))
        tensors[f"{name}.lora_b"] = np.array(mx.contiguous(b * factor))
    return tensors


def _class_and_config(folder: str | Path) -> tuple[str | None, dict[str, Any]]:
    folder = Path(folder).expanduser()
    return class_in_folder(folder), read_object(folder / "config.json")


def _alpha(adapter: Adapter) -> float:
    return float(adapter.config.scale) * adapter.config.rank


def _write(
    path: Path, architecture: str, alpha: float, tensors: dict[str, np.ndarray]
) -> None:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
