"""Cross-entropy of single tokens, accurate for a vocabulary of any size."""

from typing import Any, cast

import mlx.core as mx

_BLOCK = 256  # columns that the CPU sums in sequence


def token_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    r"""Cross-entropy :math:`\log\sum_v e^{z_v} - z_t` of each target t, for logits z.

    A GPU uses MLX's fused kernel. On a CPU without vector instructions of Apple's, MLX
    (0.32) adds the exponentials of a row in sequence, in float32: over 49,152 columns
    the probabilities then add up to 1 only within 1e-4 to 2e-4, and the loss and the
    gradient of the hidden state have an error of that size. Here the CPU adds blocks of
    256 columns, and then the blocks. The gradient is :math:`e^{z_v - \log\sum e^z}`,
    minus 1 at the target.

    Args:
        logits: Shape ``(..., vocabulary)``. The CPU computes in float32.
        targets: Token ids. Shape ``(...)``.

    Returns:
        Float32. Shape ``(...)``.
    """
    if mx.default_device() != mx.cpu:
        return mx.fast.cross_entropy(logits, targets)
    outputs: Any = _in_blocks(logits.astype(mx.float32), targets)
    return outputs[0]


def _log_sum_exp(logits: mx.array) -> mx.array:
    *lead, columns = logits.shape
    whole = columns - columns % _BLOCK
    blocks = logits[..., :whole].reshape(*lead, -1, _BLOCK)
    parts = [mx.logsumexp(blocks, axis=-1)] if whole else []
    if whole < columns:
        parts.append(mx.logsumexp(logits[..., whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)


@mx.custom_function
def _in_blocks(logits: mx.array, targets: mx.array) -> Any:
    total = _log_sum_exp(logits)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return total - chosen[..., 0], total


@_in_blocks.vjp
def _vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    logits, targets = primals
    pull = cotangents[0][..., None]
    slopes = mx.exp(logits - outputs[1][..., None]) * pull
    places = targets[..., None]
    at_target = mx.take_along_axis(slopes, places, axis=-1) - pull
    return cast(Any, mx.put_along_axis(slopes, places, at_target, axis=-1)), None
