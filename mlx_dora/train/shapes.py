"""A model's shapes from its config and the headers of its files, no weight read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import model_folder
from mlx_dora.adapters.keys import blocks, last_blocks
from mlx_dora.adapters.surgery import adaptable_paths
from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.layers import DoRAEmbedding, dora_class
from mlx_dora.train.config import FineTuneType

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Projections that read the same input.
_SHARED_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
# Those whose output the block needs in the backward pass whether adapted or not.
_KEPT_ANYWAY = ("v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """What the memory of a training depends on.

    Args:
        name: The architecture.
        weight_bytes: Of all tensors.
        element_bytes: Of one activation.
        vocabulary: Tokens.
        hidden: Width of the residual stream.
        heads: Query heads.
        block_width: Of the widest activation in a block's MLP.
        block_elements: Per trained block, numbers a token that it keeps for the
            backward pass, the attention's scores apart.
        trainable: Numbers that are trained.
    """

    name: str
    weight_bytes: int
    element_bytes: int
    vocabulary: int
    hidden: int
    heads: int
    block_width: int
    block_elements: tuple[int, ...]
    trainable: int


def read_shapes(
    model: str | Path, dora: DoRAConfig, fine_tune_type: FineTuneType
) -> ModelShapes:
    """Read the shapes of a model that is to be trained.

    Args:
        model: Folder or Hugging Face id of the model.
        dora: Which modules are adapted.
        fine_tune_type: How they are trained.

    Raises:
        DoRAError: If the model's blocks are not made of attention and one dense MLP, or
            `dora` does not fit the model.
    """
    from mlx_lm.utils import _get_classes, load_config

    folder = model_folder(model)
    config = load_config(folder)
    text = config.get("text_config", config)
    wanted = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [key for key in wanted if not isinstance(text.get(key), int)]
    experts = [key for key in _EXPERTS if text.get(key)]
    if missing or experts:
        reason = f"has {experts[0]}" if experts else f"lacks {', '.join(missing)}"
        raise DoRAError(
            f"no memory plan for {config.get('model_type')}: its config {reason}; "
            "planned are models of attention and one dense MLP a block."
        )
    try:
        kind, arguments = _get_classes(config)
    except ValueError as error:
        raise DoRAError(f"{folder}: {error}") from error
    empty = kind(arguments.from_dict(config))  # MLX makes arrays when they are needed
    checkpoint = Checkpoint(folder)
    infos = [checkpoint.info(name) for name in checkpoint.names]
    # The norms' weights have the dtype of the activations, on a packed base too.
    norm = next(i for n, i in zip(checkpoint.names, infos, strict=True) if "norm" in n)
    kept, trainable = _kept(empty, text, dora, fine_tune_type)
    return ModelShapes(
        name=str(config.get("model_type")),
        weight_bytes=sum(info.nbytes for info in infos),
        element_bytes=4 if norm.dtype == "F32" else 2,
        vocabulary=text["vocab_size"],
        hidden=text["hidden_size"],
        heads=text["num_attention_heads"],
        block_width=text["intermediate_size"],
        block_elements=tuple(kept),
        trainable=trainable,
    )


def _kept(
    model: nn.Module, config: dict[str, Any], dora: DoRAConfig, kind: FineTuneType
) -> tuple[list[int], int]:
    names = [path for path, _ in blocks(model)]
    modules = dict(model.named_modules())
    if kind == "full":
        trained = [block for _, block in last_blocks(model, dora.num_layers)]
        sizes = [v.size for b in trained for _, v in tree_flatten(b.parameters())]  # pyright: ignore[reportAttributeAccessIssue] - arrays
        each = _always(config) + 5 * config["hidden_size"] + config["intermediate_size"]
        return [each] * len(trained), sum(sizes)
    paths = adaptable_paths(model, dora)
    trainable = 0
    own: dict[str, list[tuple[str, int, int]]] = {name: [] for name in names}
    is_below = False  # whether gradients go through every block
    for path in paths:
        out, width = modules[path]["weight"].shape
        layer = dora_class(modules[path])
        trainable += dora.rank_of(path) * (out + width) + out * (kind == "dora")
        found = [name for name in names if path.startswith(f"{name}.")]
        is_below |= issubclass(layer, DoRAEmbedding)
        if found:
            own[found[0]].append((path.rsplit(".", 1)[-1], out, width))
    first = next((i for i, name in enumerate(names) if own[name]), len(names))
    if is_below:
        first = 0
    kept = []
    for name in names[first:]:
        inputs = {_SHARED_INPUT.get(leaf, leaf): width for leaf, _, width in own[name]}
        outputs = [
            out
            for leaf, out, _ in own[name]
            if kind == "dora" and leaf not in _KEPT_ANYWAY
        ]
        kept.append(_always(config) + sum(inputs.values()) + sum(outputs))
    return kept, trainable


def _always(config: dict[str, Any]) -> int:
    """Numbers a token that any block keeps, adapted or not.

    Two residuals; queries and keys, rotated and laid out for the product; values; of a
    gated MLP both halves, the gate's activation and its sigmoid.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    pairs = config.get("num_key_value_heads") or heads
    return (
        2 * hidden
        + 2 * heads * head
        + 3 * pairs * head
        + 4 * config["intermediate_size"]
    )
