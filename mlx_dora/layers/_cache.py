"""The eval-mode cache: everything of a layer that does not depend on its input."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import mlx.core as mx

from mlx_dora.kernels.rescale import compose

Sources = tuple[mx.array | None, ...]


@dataclass(frozen=True, kw_only=True)
class EvalCache:
    """Arrays that inference needs, and the arrays they were made from.

    Attributes:
        sources: What this was made from, compared by identity: holding the arrays keeps
            an address from being used again.
        norm: n = ‖W0 + s·BA‖. Shape ``(..., out)``, float32.
        gain: g = m/n, or None as long as only the norm is known.
        epilogue: What `apply` needs, for one dtype of activations; or None.
    """

    sources: Sources
    norm: mx.array
    gain: mx.array | None = None
    epilogue: "Epilogue | None" = None

    def is_of(self, sources: Sources) -> bool:
        """Whether these are the arrays that this was made from."""
        return all(map(is_, self.sources, sources))


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """Eq. 5 after the base's product, with all that is constant computed.

    Attributes:
        lora_a: A in the activations' dtype. Shape ``(in, r)``.
        up: s·B. Shape ``(r, out)``, float32.
        gain: g. Shape ``(out,)``, float32.
        offset: (1 − g)·b, what the base's bias lacks. Shape ``(out,)``, or None.
    """

    lora_a: mx.array
    up: mx.array
    gain: mx.array
    offset: mx.array | None

    def apply(self, y: mx.array, x: mx.array) -> mx.array:
        """Output for base output `y` ``(..., out)`` and input `x` ``(..., in)``."""
        return compose(y, x @ self.lora_a, self.up, self.gain, self.offset)


def is_traced(arrays: Sequence[mx.array | None]) -> bool:
    """Whether a function is being traced with these arrays as its arguments.

    Under `mx.compile` and `mx.vmap` they are placeholders without values, which MLX
    refuses to evaluate with a ValueError. (Arrays that do have values are evaluated.)
    """
    try:
        mx.eval(list(arrays))
    except ValueError:
        return True
    return False
