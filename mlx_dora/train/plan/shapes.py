"""Reads a model's shapes from its config and file headers, without weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import model_folder
from mlx_dora.adapters.keys import blocks, last_blocks, takes_lora
from mlx_dora.adapters.surgery import adaptable_paths
from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.io.foreign import foreign
from mlx_dora.layers import DoRAEmbedding, dora_class
from mlx_dora.train.config import FineTuneType, Shard
from mlx_dora.train.plan.attention import AttentionCall, attention_calls
from mlx_dora.train.plan.tensor import divided_config, divided_kinds, with_axes
from mlx_dora.train.plan.traffic import DividedModule, read_modules

# Config keys for the number of experts per token.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
# Projections that read the same input.
_SHARED_INPUT = {
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "up_proj": "gate_proj",
    "expert up_proj": "expert gate_proj",
}
# Projections whose output every block keeps for the backward pass, adapted or not.
_KEPT_ANYWAY = ("v_proj", "gate_proj", "up_proj")
# Number of arrays of an expert's width that its DoRA layer keeps.
_RESCALED = 2


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """Sizes that determine the memory of a training.

    Args:
        name: Architecture of the model.
        weight_bytes: Bytes of all tensors.
        element_bytes: Bytes per element of an activation.
        vocabulary: Number of tokens in the vocabulary.
        hidden: Width of the residual stream.
        heads: Number of query heads.
        block_width: Elements per token of the widest activation in a block's MLP.
        block_elements: For each trained block, elements per token that it keeps for the
            backward pass, without attention scores.
        blocks: Number of blocks, trained or not.
        trainable: Number of trainable parameters.
        attention: The calls of attention for a number of tokens per row, one per block;
            others, or none, if the model computes attention itself.
        rows_per_unit: Rows that a step computes for each row of ``batch_size``: 2 for
            pairs.
        target_share: Largest share of a batch's positions that are targets.
        held: Bytes that the objective holds beside the model, from those of the trained
            parameters.
        modules: The linear layers and embeddings, if the model is to be divided.
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
    blocks: int
    attention: Callable[[int], Sequence[AttentionCall]] = lambda length: ()
    rows_per_unit: int = 1
    target_share: float = 1.0
    held: Callable[[int], int] = lambda trained: 0
    modules: tuple[DividedModule, ...] = ()


def read_shapes(
    model: str | Path,
    dora: DoRAConfig,
    fine_tune_type: FineTuneType,
    *,
    shard: Shard | None = None,
    processes: int = 1,
) -> ModelShapes:
    """Read the shapes of a model to be trained.

    Args:
        model: Folder or Hugging Face id of the model.
        dora: Settings of the adapter.
        fine_tune_type: Kind of the training.
        shard: How processes divide the weights; None if they do not.
        processes: Number of processes; with tensor parallelism, the sizes of what is
            divided are those of one of them.

    Raises:
        DoRAError: If the model's blocks are not attention and an MLP (dense or of
            experts), or `dora` does not match the model.
    """
    from mlx_lm.utils import load_config

    folder = model_folder(model)
    with foreign(folder):
        config = load_config(folder)
    checkpoint = Checkpoint(folder)
    infos = [checkpoint.info(name) for name in checkpoint.names]
    # The norms' weights have the dtype of the activations, even on a quantized base.
    norm = next(i for n, i in zip(checkpoint.names, infos, strict=True) if "norm" in n)
    empty = build_empty(config, folder)
    shapes = shapes_of(empty, config, dora, fine_tune_type)
    size = 4 if norm.dtype == "F32" else 2
    modules: tuple[DividedModule, ...] = ()
    if shard is not None and processes > 1:
        by_name = dict(zip(checkpoint.names, infos, strict=True))
        modules = read_modules(empty, by_name, adaptable_paths(empty, dora), size)
    if modules and shard == "tensor":
        ranks = {m.path: dora.rank_of(m.path) for m in modules if m.is_adapted}
        text = divided_config(_text_config(config), processes)
        divided = build_empty(config, folder)
        modules = with_axes(modules, divided_kinds(divided, processes), ranks)
        shapes = _of_one(shapes, divided, text, dora, fine_tune_type)
    return replace(
        shapes,
        weight_bytes=sum(info.nbytes for info in infos),
        element_bytes=size,
        modules=modules,
    )


def build_empty(config: dict[str, Any], source: object) -> nn.Module:
    """Build mlx-lm's model of a config; no weight is allocated, since MLX is lazy.

    Args:
        config: The model's config.
        source: Name of the model, for errors.

    Raises:
        DoRAError: If mlx-lm has no such model, or its blocks are not attention and an
            MLP.
    """
    from mlx_lm.utils import _get_classes

    text = _text_config(config)
    wanted = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if missing := [key for key in wanted if not isinstance(text.get(key), int)]:
        raise _unplanned(config, f"its config lacks {', '.join(missing)}")
    if text.get("kv_lora_rank"):
        raise _unplanned(config, "its attention is latent (kv_lora_rank)")
    with foreign(source):
        kind, arguments = _get_classes(config)
        return kind(arguments.from_dict(config))


def shapes_of(
    empty: nn.Module,
    config: dict[str, Any],
    dora: DoRAConfig,
    fine_tune_type: FineTuneType,
) -> ModelShapes:
    """The shapes of a model from `build_empty`, with weights of 16 bits.

    Raises:
        DoRAError: As `read_shapes`.
    """
    text = _text_config(config)
    mlps = _mlps(empty, config, text)
    if fine_tune_type == "full" and any(mlp.chosen for mlp in mlps.values()):
        raise _unplanned(config, "experts are planned with adapters only")
    kept, trainable = _kept(empty, text, mlps, dora, fine_tune_type)
    return ModelShapes(
        name=str(config.get("model_type")),
        weight_bytes=sum(2 * v.size for _, v in tree_flatten(empty.parameters())),  # pyright: ignore[reportAttributeAccessIssue] - arrays
        element_bytes=2,
        vocabulary=text["vocab_size"],
        hidden=text["hidden_size"],
        heads=text["num_attention_heads"],
        block_width=max(mlp.width for mlp in mlps.values()),
        block_elements=tuple(kept),
        trainable=trainable,
        blocks=len(blocks(empty)),
        attention=cache(partial(attention_calls, empty)),
    )


def _of_one(
    shapes: ModelShapes,
    divided: nn.Module,
    text: dict[str, Any],
    dora: DoRAConfig,
    kind: FineTuneType,
) -> ModelShapes:
    """The shapes of one process with tensor parallelism, from the divided model."""
    width = text["intermediate_size"]
    dense = _MLP(hidden=width, width=width)
    mlps = dict.fromkeys((path for path, _ in blocks(divided)), dense)
    kept, _ = _kept(divided, text, mlps, dora, kind)
    return replace(
        shapes,
        heads=text["num_attention_heads"],
        block_width=max(text["hidden_size"], width),
        block_elements=tuple(kept),
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise _unplanned(config, "its text_config is not an object")
    return text


def _unplanned(config: dict[str, Any], reason: str) -> DoRAError:
    return DoRAError(
        f"no memory plan for {config.get('model_type')}: {reason}; only models "
        "whose blocks are attention and an MLP, dense or of experts (mlx-lm's "
        "SwitchGLU), have a plan."
    )


@dataclass(frozen=True, kw_only=True)
class _MLP:
    """A block's MLP: elements per token of its hidden layer and widest array."""

    hidden: int
    width: int
    chosen: int = 0  # experts per token; 0 in a dense block
    mixed: int = 0  # elements per token of the unsummed outputs of the experts


def _mlps(
    model: nn.Module, config: dict[str, Any], text: dict[str, Any]
) -> dict[str, _MLP]:
    """The MLP of each block, by the block's path."""
    mlps = {}
    dense = text["intermediate_size"]
    for name, block in blocks(model):
        modules = [(path, m) for path, m in block.named_modules() if path]
        stacks = [path for path, m in modules if _is_stack(m)]
        if not stacks:
            mlps[name] = _MLP(hidden=dense, width=dense)
            continue
        homes = {path.rpartition(".")[0] for path in stacks}
        kinds = {type(m).__name__ for path, m in modules if path in homes}
        chosen = next((text[key] for key in _CHOSEN if text.get(key)), 0)
        if kinds != {"SwitchGLU"} or len(homes) > 1 or not chosen:
            reason = f"{name} has {', '.join(stacks)}"
            if not chosen:
                reason = f"its config has none of {', '.join(_CHOSEN)}"
            raise _unplanned(config, reason)
        (home,) = homes
        _, out, width = dict(modules)[f"{home}.down_proj"]["weight"].shape
        # Shared experts, which every token uses, are dense MLPs beside the stacks.
        shared = sum(
            m["weight"].shape[1]
            for path, m in modules
            if path.endswith("down_proj") and not _is_stack(m)
        )
        mlps[name] = _MLP(
            hidden=chosen * width + shared,
            width=chosen * max(width, out),
            chosen=chosen,
            mixed=chosen * out,
        )
    return mlps


def _is_stack(module: nn.Module) -> bool:
    return "weight" in module and module["weight"].ndim == 3 and takes_lora(module)


def _kept(
    model: nn.Module,
    config: dict[str, Any],
    mlps: dict[str, _MLP],
    dora: DoRAConfig,
    kind: FineTuneType,
) -> tuple[list[int], int]:
    names = [path for path, _ in blocks(model)]
    modules = dict(model.named_modules())
    if kind == "full":
        trained = [block for _, block in last_blocks(model, dora.num_layers)]
        sizes = [v.size for b in trained for _, v in tree_flatten(b.parameters())]  # pyright: ignore[reportAttributeAccessIssue] - arrays
        width = config["intermediate_size"]
        dense = _MLP(hidden=width, width=width)
        each = _always(config, dense) + 5 * config["hidden_size"] + width
        return [each] * len(trained), sum(sizes)
    paths = adaptable_paths(model, dora)
    trainable = 0
    own: dict[str, list[tuple[str, int, int, bool]]] = {name: [] for name in names}
    is_below = False  # whether gradients pass through every block
    for path in paths:
        *stack, out, width = modules[path]["weight"].shape
        layer = dora_class(modules[path])
        each = dora.rank_of(path) * (out + width) + out * (kind == "dora")
        trainable += math.prod(stack) * each
        homes = [name for name in names if path.startswith(f"{name}.")]
        is_below |= issubclass(layer, DoRAEmbedding)
        if homes:
            leaf = path.rsplit(".", 1)[-1]
            if stack:  # once per chosen expert, shared with no other
                times, leaf = mlps[homes[0]].chosen, f"expert {leaf}"
                out, width = times * out, times * width
            own[homes[0]].append((leaf, out, width, bool(stack)))
    first = next((i for i, name in enumerate(names) if own[name]), len(names))
    if is_below:
        first = 0
    kept = []
    for name in names[first:]:
        inputs = {
            _SHARED_INPUT.get(leaf, leaf): width for leaf, _, width, _ in own[name]
        }
        outputs = [
            # Expert layers also keep the rescaled output and its factors.
            out * (_RESCALED if is_stack else 1)
            for leaf, out, _, is_stack in own[name]
            if kind == "dora" and leaf not in _KEPT_ANYWAY
        ]
        kept.append(_always(config, mlps[name]) + sum(inputs.values()) + sum(outputs))
    return kept, trainable


def _always(config: dict[str, Any], mlp: _MLP) -> int:
    """Elements per token that every block keeps, adapted or not.

    These are two residuals; queries and keys, rotated and laid out for the product;
    values; both halves of a gated MLP, the gate's activation and its sigmoid; and the
    outputs of experts.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    pairs = config.get("num_key_value_heads") or heads
    return 2 * hidden + 2 * heads * head + 3 * pairs * head + 4 * mlp.hidden + mlp.mixed
