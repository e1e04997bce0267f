"""What a first pass through layers keeps for a second pass, which recomputes it."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_dora.kernels.plain import rescale_known
from mlx_dora.kernels.rescale import rescale

# Tokens per column of W0 up to which an output is kept: it is then at most half as
# large as W0.
_TOKENS_PER_COLUMN = 0.5


@dataclass
class SharedPass:
    """Calls of the layers that share a pass.

    The gradient of a magnitude needs the output of its layer. Of a block's last layer,
    nothing else does: its product with W0 need not be computed again if the output is
    kept. This is done on a CPU and with few tokens, where the output is small.

    Attributes:
        known: Outputs of the first pass by `id` of the layer.
        calls: The layer and the output of each call; None for an output that is large.
    """

    known: dict[int, mx.array] = field(default_factory=dict)
    calls: list[tuple[Any, mx.array | None]] = field(default_factory=list)

    def rescale(self, layer: Any, x: mx.array, *arguments: Any) -> mx.array:
        """Return `rescale` of the arguments, computed or known from the first pass."""
        known = self.known.get(id(layer))
        if known is not None:
            return rescale_known(*arguments, known)
        output = rescale(*arguments)
        tokens, width = x.size // x.shape[-1], x.shape[-1]
        keeps = (
            tokens <= _TOKENS_PER_COLUMN * width
            and mx.default_device().type == mx.DeviceType.cpu
        )
        self.calls.append((layer, output if keeps else None))
        return output

    def last(self) -> tuple[Any, mx.array] | None:
        """Return the last layer and its output, if it is kept and was called once."""
        if not self.calls:
            return None
        layer, output = self.calls[-1]
        once = sum(other is layer for other, _ in self.calls) == 1
        return (layer, output) if once and output is not None else None
