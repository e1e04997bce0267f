"""DoRA for mlx-lm's experts, `SwitchLinear` and `QuantizedSwitchLinear`."""

from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers._layer import DoRALayer

if TYPE_CHECKING:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear


class DoRASwitchLinear(DoRALayer):
    r"""Experts with trained magnitudes and low-rank updates.

    .. math:: y = m_e \circ \frac{W_e x + s\,B_e(A_e x)}{\lVert W_e + s\,B_eA_e \rVert}
        + b_e

    This is Eq. 5 of DoRA (arXiv:2402.09353) for each expert e, with one norm per expert
    and output row, which is a constant in the backward pass. Initially, the output
    equals the base's bit for bit. Norms come from factored terms, batched over experts:
    no array of the weight's size is made, and a packed weight is not unpacked as a
    whole.

    Parameters, laid out as in mlx-lm's `LoRASwitchLinear`: ``lora_a``
    ``(experts, r, input_dims)``, ``lora_b`` ``(experts, output_dims, r)``; and ``m``
    ``(experts, output_dims)``; float32. Calls are like those of the base, with
    expert indices, sorted or not.

    Attributes:
        linear: The frozen base.
        enabled: If False, the layer computes the output of its base.

    Args:
        input_dims: Width of the input.
        output_dims: Width of the output.
        num_experts: Number of experts.
        r: Rank of the update.
        dropout: Dropout probability for inputs of the low-rank branch.
        scale: Multiplier s of the update.
        bias: Whether the base has a bias.
    """

    base_name: ClassVar[str] = "linear"
    layout = "stack"
    linear: "SwitchLinear | QuantizedSwitchLinear"

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        r: int = 8,
        dropout: float = 0.0,
        scale: float = 20.0,
        bias: bool = False,
    ) -> None:
        from mlx_lm.models.switch_layers import SwitchLinear

        super().__init__()
        base = SwitchLinear(input_dims, output_dims, num_experts, bias=bias)
        self._adapt(base, r, dropout, scale)

    @classmethod
    def base_types(cls) -> tuple[type[nn.Module], ...]:
        """Return the classes of modules that this layer can wrap."""
        from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

        return SwitchLinear, QuantizedSwitchLinear

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """Return the output of the selected experts, in the base's layout.

        Args:
            x: Input, shape ``(..., 1, in)``, broadcast against `indices`.
            indices: Expert indices, shape ``(..., k)`` or ``(n,)``.
            sorted_indices: Whether the indices are in order, which is faster.

        Returns:
            Output, shape ``(..., k, 1, out)``, in the base's dtype.
        """
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if not self.enabled:
            return y
        a, b = self.factors()
        picked: dict[str, Any] = {
            "rhs_indices": indices,
            "sorted_indices": sorted_indices,
        }
        # On the CPU, MLX's gathered product supports only float32.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        dtype = mx.float32 if on_cpu else x.dtype
        low = self.dropout(x).astype(dtype)
        h = mx.gather_mm(low, a.astype(dtype), **picked)
        h = h.astype(mx.float32) * self.scale
        update = mx.gather_mm(h, b.astype(mx.float32), **picked)
        gain = self.gain()[indices][..., None, :]
        adapted = gain * (y.astype(mx.float32) + update)
        if "bias" in self.linear:
            bias = self.linear["bias"].astype(mx.float32)[indices][..., None, :]
            adapted = adapted + (1 - gain) * bias
        return adapted.astype(y.dtype)
