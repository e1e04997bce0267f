"""The eval-mode cache: everything in a layer that does not depend on its input."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.kernels.rescale import compose

Sources = tuple[mx.array | None, ...]


@dataclass(frozen=True, kw_only=True)
class EvalCache:
    """Arrays for inference, and the arrays they were computed from.

    Attributes:
        sources: Arrays that the cache was computed from, compared by identity. Holding
            them prevents their addresses from being reused.
        gain: g = m/‖W0 + s·BA‖. Shape ``(..., out)``, float32.
        epilogue: Constants for one dtype of activations, or None.
    """

    sources: Sources
    gain: mx.array
    epilogue: "Epilogue | None" = None


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """The part of Eq. 5 after the base's product, with all constants precomputed.

    Attributes:
        lora_a: A in the activations' dtype. Shape ``(in, r)``.
        up: s·B. Shape ``(r, out)``, float32.
        gain: Gain g. Shape ``(out,)``, float32.
        offset: (1 − g)·b, which restores the base's bias. Shape ``(out,)``, or None.
    """

    lora_a: mx.array
    up: mx.array
    gain: mx.array
    offset: mx.array | None

    def apply(self, y: mx.array, x: mx.array) -> mx.array:
        """Return the output for base output `y` ``(..., out)`` and input ``x``."""
        return compose(y, x @ self.lora_a, self.up, self.gain, self.offset)


def is_traced(arrays: Sequence[mx.array | None]) -> bool:
    """Return whether these arrays are being traced as arguments of a function.

    Under `mx.compile` and `mx.vmap`, arguments are placeholders without values, and MLX
    raises a ValueError when they are evaluated. Other arrays are evaluated here.
    """
    try:
        mx.eval(list(arrays))
    except ValueError:
        return True
    return False
