"""Log-probabilities of a batch's targets, one by one and summed over each row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_dora.evaluate.cross_entropy import (
    head_parameters,
    split_head,
    target_places,
    token_losses,
    warn_of_whole,
)
from mlx_dora.evaluate.loss import marked_targets

_OfChunk = Callable[[int, mx.array], mx.array]
"""``(start, hidden states) -> log-probabilities`` of a chunk of targets."""


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """Log-probabilities of a batch's targets under a model.

    Args:
        each: Log-probability of each target; 0 where there is none. Float32, shape
            ``(rows, positions)``: position t is the token of the row with index t + 1.
        mask: Whether each position is a target. Booleans of that shape.
    """

    each: mx.array
    mask: mx.array

    @property
    def total(self) -> mx.array:
        """Sum over each row's targets. Float32, shape ``(rows,)``."""
        return mx.where(self.mask, self.each, 0.0).sum(axis=1)

    @property
    def count(self) -> mx.array:
        """Number of each row's targets. Int32, shape ``(rows,)``."""
        return self.mask.sum(axis=1)

    @property
    def mean(self) -> mx.array:
        """Mean over each row's targets; 0 for a row without any. Shape ``(rows,)``."""
        return self.total / mx.maximum(self.count, 1)


def row_log_probs(
    model: nn.Module,
    tokens: mx.array,
    marks: mx.array,
    *,
    gradient: bool = True,
    mask: mx.array | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """Log-probabilities of the targets of a batch.

    Args:
        model: Maps tokens ``(rows, length)`` to logits.
        tokens: Tokens of the batch. Shape ``(rows, length)``.
        marks: Its marks, see `mlx_dora.data.batches.Batch`.
        gradient: Whether gradients will be taken; without, less memory is needed.
        mask: Positions to compute, if other than the targets; a superset of them.
            Shape ``(rows, length - 1)``.
        temperature: Divides the logits.
    """
    targets = marked_targets(marks, tokens.shape[1] - 1)
    wanted = targets if mask is None else mask
    each = target_log_probs(
        model,
        tokens[:, :-1],
        tokens[:, 1:],
        wanted,
        gradient=gradient,
        temperature=temperature,
    )
    return LogProbs(each=each, mask=targets)


def target_log_probs(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    mask: mx.array,
    *,
    gradient: bool = True,
    temperature: float = 1.0,
) -> mx.array:
    r"""Log-probability :math:`z_t - \log\sum_v e^{z_v}` of each target, for logits z.

    As in `summed_loss`, the trunk runs once, and the head in chunks of tokens, forward
    and backward, so that the logits of a batch never exist as a whole. A token's
    log-probability depends on its own hidden state only. Its gradient with respect to
    that state is therefore computed while its logits exist, and scaled in the backward
    pass. Where the head itself has trainable parameters, the backward pass computes the
    logits of each chunk again.

    Args:
        model: Maps tokens to logits.
        inputs: Tokens. Shape ``(rows, length)``.
        targets: The tokens to predict. Shape ``(rows, length)``.
        mask: Whether each target counts. Shape ``(rows, length)``.
        gradient: Whether gradients will be taken.
        temperature: Divides the logits.

    Returns:
        Float32 ``(rows, length)``; 0 outside the mask.
    """
    shape = targets.shape
    logits, split = split_head(model, inputs, None)
    if split is None:
        warn_of_whole(model)
        return -token_losses(_tempered(logits, temperature), targets, mask)
    targets, mask = targets.flatten(), mask.flatten()
    places = target_places(mask)
    if places is not None:
        targets, mask = targets[places], mask[places]
        split = replace(split, hidden=split.hidden[places])
    hidden, size, head = split.hidden, split.chunk(logits.shape[-1]), split.head

    def of_chunk(start: int, hidden: mx.array) -> mx.array:
        here = slice(start, start + size)
        logits = _tempered(head(hidden), temperature)
        return -token_losses(logits, targets[here], mask[here])

    starts = range(0, targets.size, size)
    if not gradient:
        each = _in_turn(hidden, starts, size, of_chunk)
    elif named := head_parameters(model, split.blocks):
        each = _computed_again(model, named, hidden, starts, size, of_chunk)
    else:
        each = _with_slopes(hidden, starts, size, of_chunk)
    if places is not None:
        each = mx.zeros(shape[0] * shape[1]).at[places].add(each)
    return each.reshape(shape)


def _tempered(logits: mx.array, temperature: float) -> mx.array:
    return logits if temperature == 1 else logits / temperature


def _in_turn(
    hidden: mx.array, starts: range, size: int, of_chunk: _OfChunk
) -> mx.array:
    parts: list[mx.array] = []
    for start in starts:
        here = hidden[start : start + size]
        if parts:  # compute the chunks in sequence
            here = mx.depends([here], parts[-1:])[0]
        parts.append(of_chunk(start, here))
    return mx.concatenate(parts)


def _with_slopes(
    hidden: mx.array, starts: range, size: int, of_chunk: _OfChunk
) -> mx.array:
    """Keep each token's gradient with respect to its hidden state."""

    def value(hidden: mx.array, start: int) -> tuple[mx.array, mx.array]:
        each = of_chunk(start, hidden)
        return each.sum(), each

    differentiate = mx.value_and_grad(value)

    @mx.custom_function
    def computed(hidden: mx.array) -> Any:
        parts: list[mx.array] = []
        slopes: list[mx.array] = []
        for start in starts:
            here = hidden[start : start + size]
            if parts:
                here = mx.depends([here], [parts[-1], slopes[-1]])[0]
            (_, each), slope = differentiate(here, start)
            parts.append(each)
            slopes.append(slope)
        return mx.concatenate(parts), mx.concatenate(slopes)

    @computed.vjp
    def _(hidden: Any, cotangents: Any, outputs: Any) -> Any:
        return (outputs[1] * cotangents[0][:, None]).astype(hidden.dtype)

    outputs: Any = computed(hidden)
    return outputs[0]


def _computed_again(
    model: nn.Module,
    named: list[tuple[str, Any]],
    hidden: mx.array,
    starts: range,
    size: int,
    of_chunk: _OfChunk,
) -> mx.array:
    """Compute each chunk again in the backward pass, for the head's parameters."""
    names = [name for name, _ in named]

    def value(start: int, hidden: mx.array, *parameters: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        try:
            return of_chunk(start, hidden)
        finally:
            model.update(tree_unflatten(named))

    @mx.custom_function
    def computed(hidden: mx.array, parameters: list[mx.array]) -> Any:
        return _in_turn(
            hidden, starts, size, lambda start, here: value(start, here, *parameters)
        )

    @computed.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        hidden, parameters = primals
        slopes: list[mx.array] = []
        sums = [mx.zeros(p.shape) for p in parameters]
        for start in starts:
            end = start + size
            here = hidden[start:end]
            if slopes:
                here = mx.depends([here], [slopes[-1], *sums])[0]
            _, (slope, *own) = mx.vjp(
                lambda h, *p, at=start: value(at, h, *p),
                [here, *parameters],
                [cotangents[start:end]],
            )
            slopes.append(slope)
            sums = [a + b.astype(mx.float32) for a, b in zip(sums, own, strict=True)]
        return mx.concatenate(slopes), [
            total.astype(p.dtype) for total, p in zip(sums, parameters, strict=True)
        ]

    parameters: Any = [value for _, value in named]
    outputs: Any = computed(hidden, parameters)
    return outputs
