"""Cross-entropy over a large vocabulary without materializing all logits."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dora.evaluate.token_loss import token_cross_entropy
from mlx_dora.layers import held_whole, is_traced
from mlx_dora.matrix.sharded import pause_order

logger = logging.getLogger(__name__)

# A chunk has as many tokens as produce this many logits, but at least 128, because
# fewer do not keep a GPU busy. MLX runs ahead, so about ten chunks may exist at a time.
CHUNK_LOGITS = 1 << 22
CHUNK_TOKENS = 128
# Paths of the trunk (all but the head) in mlx-lm's models.
_TRUNKS = ("model", "language_model.model", "transformer", "backbone")

_warned: set[type[nn.Module]] = set()


class _StandIn:
    """Replaces a trunk: records its outputs, or returns the given hidden states."""

    def __init__(self, trunk: Any, hidden: mx.array | None = None) -> None:
        self.trunk = trunk
        self.hidden = hidden
        self.returned: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.hidden is not None:
            return self.hidden
        self.returned.append(self.trunk(*args, **kwargs))
        pause_order(True)  # the logits after it are not evaluated
        return self.returned[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trunk, name)  # such as a tied embedding


@contextmanager
def _in_place_of(model: nn.Module, path: str, stand_in: _StandIn) -> Iterator[None]:
    *parents, name = path.split(".")
    owner = model
    for parent in parents:
        owner = owner[parent]
    # Written into the module's dictionary: the module reads its children there.
    dict.__setitem__(owner, name, stand_in)
    try:
        yield
    finally:
        dict.__setitem__(owner, name, stand_in.trunk)


def _trunk(model: nn.Module) -> tuple[str, nn.Module] | None:
    for path in _TRUNKS:
        module: Any = model
        for name in path.split("."):
            module = module.get(name) if isinstance(module, nn.Module) else None
        if isinstance(module, nn.Module) and "layers" in module:
            return path, module
    return None


def chunk_size(vocabulary: int) -> int:
    """Maximum number of tokens whose logits are computed together."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)


def summed_loss(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    mask: mx.array,
    cache: Any = None,
) -> mx.array:
    r"""Sum :math:`\log\sum_v e^{z_v} - z_t` over the targets, for logits z.

    The model's trunk runs once. The head (including any processing of the logits) runs
    in chunks of tokens, through the model's own code, and only where there is a target:
    with masked prompts, most tokens need no logits. (In a compiled step the mask has no
    values yet, so the head runs on all tokens.) In train mode the gradient of a
    chunk with respect to its hidden states and the head's trainable parameters is
    computed while its logits exist, so that the backward pass needs no logits, as in
    Liger's fused linear cross-entropy (arXiv:2410.10989). The gradients are exact for
    these arrays and for the trunk; other arrays of the head are treated as constants.

    Args:
        model: Maps tokens and a cache to logits.
        inputs: Tokens. Shape ``(rows, length)``.
        targets: The tokens to predict. Shape ``(rows, length)``.
        mask: Whether each target counts. Shape ``(rows, length)``.
        cache: Passed to the model unless None.

    Returns:
        The sum, float32. If the model's trunk is unknown, all logits are computed at
        once, with one warning.
    """
    logits, split = split_head(model, inputs, cache)
    if split is None:
        warn_of_whole(model)
        return token_losses(logits, targets, mask).sum()
    targets, mask = targets.flatten(), mask.flatten()
    if (places := target_places(mask)) is not None:
        targets, mask = targets[places], mask[places]
        split = replace(split, hidden=split.hidden[places])
    hidden, size = split.hidden, split.chunk(logits.shape[-1])

    def of_chunk(start: int, hidden: mx.array) -> mx.array:
        here = slice(start, start + size)
        return token_losses(split.head(hidden), targets[here], mask[here]).sum()

    starts = range(0, targets.size, size)
    # A head whose rows are divided among processes is gathered once for all chunks.
    with held_whole(model, hidden):
        if not model.training:
            return _in_turn(hidden, starts, size, of_chunk)
        return _with_gradient(model, split.blocks, hidden, starts, size, of_chunk)


def target_places(mask: mx.array) -> mx.array | None:
    """Return the indices of a flat mask's targets; None if unknown, or for none."""
    if is_traced([mask]):
        return None
    places = np.flatnonzero(np.array(mask))
    return mx.array(places.astype(np.int32)) if places.size else None


def sample_targets(model: nn.Module, inputs: mx.array, key: mx.array) -> mx.array:
    """Sample each next token from the model's own distribution.

    Args:
        model: Maps tokens to logits.
        inputs: Tokens. Shape ``(rows, length)``.
        key: Random key.

    Returns:
        Evaluated tokens, ``(rows, length)``. Logits are computed in chunks.
    """
    logits, split = split_head(model, inputs, None)
    if split is None:
        drawn = mx.random.categorical(logits.astype(mx.float32), key=key)
        mx.eval(drawn)
        return drawn
    size, parts = split.chunk(logits.shape[-1]), []
    for start in range(0, inputs.size, size):
        key, own = mx.random.split(key)
        part = split.head(split.hidden[start : start + size]).astype(mx.float32)
        parts.append(mx.random.categorical(part, key=own))
        mx.eval(parts[-1])
    return mx.concatenate(parts).reshape(inputs.shape)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A model split before its head: hidden states ``(tokens, width)`` and head."""

    path: str
    hidden: mx.array
    head: Callable[[mx.array], mx.array]

    @property
    def blocks(self) -> str:
        """Prefix of the names of the parameters in the trunk's blocks."""
        return f"{self.path}.layers."

    def chunk(self, vocabulary: int) -> int:
        """Number of tokens per chunk, for chunks of about equal size."""
        tokens = self.hidden.shape[0]
        return -(-tokens // -(-tokens // chunk_size(vocabulary)))


def split_head(
    model: nn.Module, inputs: mx.array, cache: Any
) -> tuple[mx.array, Split | None]:
    """The unevaluated logits, and the model in two parts if its trunk is known."""
    arguments = {} if cache is None else {"cache": cache}
    trunk = _trunk(model)
    if trunk is None:
        return model(inputs, **arguments), None
    path, inner = trunk
    noted = _StandIn(inner)
    try:
        with _in_place_of(model, path, noted):
            logits = model(inputs, **arguments)  # not evaluated if split into chunks
    finally:
        pause_order(False)
    hidden = noted.returned[0] if len(noted.returned) == 1 else None
    if not isinstance(hidden, mx.array) or hidden.shape[:-1] != inputs.shape:
        return logits, None
    tokens = inputs.flatten()[None]

    def head(hidden: mx.array) -> mx.array:
        with _in_place_of(model, path, _StandIn(inner, hidden[None])):
            return model(tokens, **arguments).flatten(0, 1)

    return logits, Split(path=path, hidden=hidden.flatten(0, 1), head=head)


def token_losses(logits: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """Cross-entropy of each target in float32, 0 outside the mask."""
    return mx.where(mask, token_cross_entropy(logits, targets), 0.0)


def warn_of_whole(model: nn.Module) -> None:
    """Warn, once per class, that all logits of a batch are computed at once."""
    if type(model) not in _warned:
        _warned.add(type(model))
        logger.warning(
            "%s: no known trunk, so the logits of a whole batch are in memory at once",
            type(model).__name__,
        )


def _in_turn(
    hidden: mx.array,
    starts: range,
    size: int,
    of_chunk: Callable[[int, mx.array], mx.array],
) -> mx.array:
    total = mx.array(0.0)
    for start in starts:
        here = hidden[start : start + size]
        total = total + of_chunk(start, mx.depends([here], [total])[0])
    return total


def head_parameters(model: nn.Module, blocks: str) -> list[tuple[str, Any]]:
    """The trainable parameters outside the trunk's blocks, by name.

    Args:
        model: The model.
        blocks: Prefix of the names of the blocks' parameters.
    """
    flat = tree_flatten(model.trainable_parameters())
    return [(name, value) for name, value in flat if not name.startswith(blocks)]


def _with_gradient(
    model: nn.Module,
    blocks: str,
    hidden: mx.array,
    starts: range,
    size: int,
    of_chunk: Callable[[int, mx.array], mx.array],
) -> mx.array:
    named = head_parameters(model, blocks)
    names = [name for name, _ in named]

    def value(parameters: list[mx.array], hidden: mx.array, start: int) -> mx.array:
        model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        return of_chunk(start, hidden)

    differentiate = mx.value_and_grad(value, argnums=(0, 1))

    @mx.custom_function
    def summed(hidden: mx.array, parameters: list[mx.array]) -> Any:
        total, slopes = mx.array(0.0), []
        sums = [mx.zeros(p.shape) for p in parameters]
        for start in starts:
            here = hidden[start : start + size]
            if slopes:  # compute the chunks in sequence
                here = mx.depends([here], [total, slopes[-1], *sums])[0]
            loss, (own, slope) = differentiate(parameters, here, start)
            total = total + loss
            slopes.append(slope)
            sums = [a + b.astype(mx.float32) for a, b in zip(sums, own, strict=True)]
        return total, mx.concatenate(slopes), *sums

    @summed.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        hidden, parameters = primals
        _, slope, *sums = outputs
        weight = cotangents[0]
        return (slope * weight).astype(hidden.dtype), [
            (total * weight).astype(p.dtype)
            for total, p in zip(sums, parameters, strict=True)
        ]

    parameters: Any = [value for _, value in named]
    try:
        outputs: Any = summed(hidden, parameters)
        return outputs[0]
    finally:
        model.update(tree_unflatten(named))
