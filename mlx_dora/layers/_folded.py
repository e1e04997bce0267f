"""The eval-mode cache: everything of a layer that does not depend on its input."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.factored import factored_terms
from mlx_dora.kernels.dora_scale import compose
from mlx_dora.kernels.reference import row_gain
from mlx_dora.kernels.rows import Weight


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Arrays that inference needs, and the ones they were made from.

    Attributes:
        sources: The arrays this was made from, compared by identity: holding them
            keeps an address from being used again.
        down: A in the activations' dtype. Shape ``(in, r)``.
        up: s·B. Shape ``(r, out)``, float32.
        gain: g = m / n. Shape ``(out,)``, float32.
        offset: (1 − g)·b, what the base's bias lacks. Shape ``(out,)``, or None.
    """

    sources: tuple[mx.array | None, ...]
    down: mx.array
    up: mx.array
    gain: mx.array
    offset: mx.array | None

    def fits(self, sources: tuple[mx.array | None, ...], dtype: mx.Dtype) -> bool:
        """Whether this still holds for these arrays and this activation dtype."""
        return self.down.dtype == dtype and all(
            a is b for a, b in zip(self.sources, sources, strict=True)
        )

    def apply(self, y: mx.array, x: mx.array) -> mx.array:
        """Output for base output `y` ``(..., out)`` and input `x` ``(..., in)``."""
        return compose(y, x @ self.down, self.up, self.gain, self.offset)


def fold(
    sources: tuple[mx.array | None, ...],
    weight: Weight,
    lora_a: mx.array,
    lora_b: mx.array,
    scale: float,
    m: mx.array,
    bias: mx.array | None,
    dtype: mx.Dtype,
    norm: mx.array | None = None,
) -> Folded | None:
    """Compute the cache now, or return None while a function is being traced.

    Where the norm is known, the weight is not read.

    Under `mx.compile` and `mx.vmap` the parameters are placeholders without values;
    MLX then refuses to evaluate them, which is how tracing is recognised.
    """
    try:
        mx.eval(lora_a, lora_b, m)
    except ValueError:
        return None
    # Gradients in eval mode go through here too, and the norm is a constant for them.
    if norm is None:
        norm = factored_terms(weight, lora_a, lora_b, scale).norm
    norm = mx.stop_gradient(norm)
    gain = row_gain(m, norm)
    up = scale * lora_b.astype(mx.float32)
    down = lora_a.astype(dtype)
    offset = None if bias is None else (1 - gain) * bias.astype(mx.float32)
    mx.eval(
        gain, up, down, offset
    )  # a server may fill it in one thread, use in another
    return Folded(sources=sources, down=down, up=up, gain=gain, offset=offset)
