"""What the variants without a norm end with."""

import mlx.core as mx


def scaled_sum(
    y: mx.array,
    gain: mx.array,
    low: mx.array | None = None,
    up: mx.array | None = None,
    offset: mx.array | None = None,
) -> mx.array:
    """``gain∘y + low·up + offset`` in float32, rounded once to the dtype of `y`.

    Args:
        y: Output of the base. Shape ``(..., out)``.
        gain: Shape ``(out,)`` or ``()``, float32.
        low: Low-rank activation. Shape ``(..., r)``; None for no such part.
        up: Shape ``(r, out)``, float32.
        offset: Shape ``(out,)`` float32, or None.
    """
    out = gain * y.astype(mx.float32)
    if low is not None and up is not None:
        out = out + low.astype(mx.float32) @ up
    if offset is not None:
        out = out + offset
    return out.astype(y.dtype)
