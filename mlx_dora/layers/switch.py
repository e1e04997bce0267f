"""DoRA for mlx-lm's experts, `SwitchLinear` and `QuantizedSwitchLinear`."""

import math
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_dora.errors import DoRAError
from mlx_dora.kernels.reference import factored_norm, row_gain, update_terms
from mlx_dora.kernels.rows import row_squares
from mlx_dora.layers._base import weight_of
from mlx_dora.layers._fuse import fused_module
from mlx_dora.layers._layer import DoRALayer
from mlx_dora.layers.linear import DoRALinear

_ARRAYS = ("weight", "scales", "biases", "bias")


class DoRASwitchLinear(DoRALayer):
    r"""Experts whose magnitudes and low-rank directions are trained.

    .. math:: y = m_e \circ \frac{W_e x + s\,B_e(A_e x)}{\lVert W_e + s\,B_eA_e \rVert}
        + b_e

    Eq. 5 of DoRA (arXiv:2402.09353) for each expert e: one norm per expert and output
    row, a constant in the backward pass. At the start the layer equals its base bit for
    bit. Norms come from the factored terms, batched over experts: no array of the
    weight's size is made, a packed weight is not unpacked as a whole.

    Parameters, laid out as in mlx-lm's `LoRASwitchLinear`: ``lora_a``
    ``(experts, r, input_dims)``, ``lora_b`` ``(experts, output_dims, r)``; and ``m``
    ``(experts, output_dims)``; float32. Called as the base is, with the experts'
    indices, sorted or not.

    Attributes:
        linear: The frozen base.
        enabled: False makes the layer its base, m included.

    Args:
        input_dims: Width of the input.
        output_dims: Width of the output.
        num_experts: Number of experts.
        r: Rank of the update.
        dropout: Probability of dropping an input of the low-rank branch.
        scale: Multiplier s of the update.
        bias: Whether the base has a bias.
    """

    base_name: ClassVar[str] = "linear"
    base_types = (SwitchLinear, QuantizedSwitchLinear)
    linear: SwitchLinear | QuantizedSwitchLinear

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
        super().__init__()
        base = SwitchLinear(input_dims, output_dims, num_experts, bias=bias)
        self.adapt(base, r, dropout, scale)

    def adapt(self, base: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Take a base and start from it: a random A, B = 0 and m = ‖W_e‖."""
        self.check_base(base)
        assert isinstance(base, SwitchLinear | QuantizedSwitchLinear)
        experts, out, width = base.num_experts, base.output_dims, base.input_dims
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.enabled = True
        bound = 1 / math.sqrt(width)
        self.lora_a = mx.random.uniform(
            low=-bound, high=bound, shape=(experts, r, width)
        )
        self.lora_b = mx.zeros((experts, out, r))
        self.set_base(base)

    def check_base(self, base: nn.Module) -> None:
        """Refuse other classes, and packed weights with a global scale."""
        super().check_base(base)
        if getattr(base, "global_scale", None) is not None:
            raise DoRAError(
                "experts whose weights have a global scale cannot take DoRA."
            )

    def factors(self) -> tuple[mx.array, mx.array]:
        """A ``(experts, in, r)`` and B ``(experts, r, out)``."""
        return self["lora_a"].swapaxes(-1, -2), self["lora_b"].swapaxes(-1, -2)

    def norm(self) -> mx.array:
        """Norm of every adapted row, without a gradient. ``(experts, out)`` float32."""
        if "_norm" in self:
            return self["_norm"]
        a, b = (mx.stop_gradient(self[name]) for name in ("lora_a", "lora_b"))
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        base = self.linear
        if isinstance(base, QuantizedSwitchLinear):
            product = mx.quantized_matmul(
                a,
                base["weight"],
                scales=base["scales"],
                biases=base.get("biases"),
                transpose=True,
                group_size=base.group_size,
                bits=base.bits,
                mode=base.mode,
            ).swapaxes(-1, -2)
        else:
            weight = base["weight"]
            product = weight @ a.swapaxes(-1, -2).astype(weight.dtype)
        cross, update = mx.vmap(update_terms)(
            product.astype(mx.float32), a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        )
        norm = factored_norm(self["_squared_base"], cross, update, self.scale)
        return mx.stop_gradient(norm)

    def invalidate(self) -> None:
        """Forget what eval mode has cached, after writing into a parameter's array."""
        super().invalidate()
        self.pop("_gain", None)

    def gain(self) -> mx.array:
        """G = m/‖W_e + s·B_eA_e‖, kept in eval mode. ``(experts, out)`` float32."""
        if self.training:
            return row_gain(self["m"], self.norm())
        names = ("m", "lora_a", "lora_b")
        sources = [*(self[name] for name in names), self.linear["weight"]]
        kept, gain = self.get("_gain", ((), None))
        if gain is None or any(a is not b for a, b in zip(kept, sources, strict=True)):
            gain = row_gain(self["m"], self.norm())
            mx.eval(gain)
            self._gain = (sources, gain)
        return cast(mx.array, gain)

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """Output of the experts that `indices` name, as the base gives it.

        Args:
            x: Shape ``(..., 1, in)``, broadcast against `indices`.
            indices: An expert each. Shape ``(..., k)``, or ``(n,)``.
            sorted_indices: Whether they are in order, which is faster.

        Returns:
            Shape ``(..., k, 1, out)``, in the base's dtype.
        """
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if not self.enabled:
            return y
        down, up = self.factors()
        picked: dict[str, Any] = {
            "rhs_indices": indices,
            "sorted_indices": sorted_indices,
        }
        # MLX's gathered product is float32 alone on the CPU.
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        dtype = mx.float32 if on_cpu else x.dtype
        low = self.dropout(x).astype(dtype)
        h = mx.gather_mm(low, down.astype(dtype), **picked)
        h = h.astype(mx.float32) * self.scale
        update = mx.gather_mm(h, up.astype(mx.float32), **picked)
        gain = self.gain()[indices][..., None, :]
        adapted = gain * (y.astype(mx.float32) + update)
        if "bias" in self.linear:
            bias = self.linear["bias"].astype(mx.float32)[indices][..., None, :]
            adapted = adapted + (1 - gain) * bias
        return adapted.astype(y.dtype)

    def expert(self, index: int) -> DoRALinear:
        """One expert as a layer of its own, sharing nothing that is trained."""
        layer = DoRALinear.__new__(DoRALinear)
        nn.Module.__init__(layer)
        layer.dropout, layer.scale, layer.enabled = self.dropout, self.scale, True
        layer.set_base(one_expert(self.linear, index))
        layer.lora_a = self["lora_a"][index].T
        layer.lora_b = self["lora_b"][index].T
        layer.m = self["m"][index]
        return layer

    def fuse(self, dequantize: bool = False) -> SwitchLinear | QuantizedSwitchLinear:
        """The adapted experts as plain ones, one after the other.

        Args:
            dequantize: Return a `SwitchLinear` for a packed base too.

        Returns:
            A module of the base's class (dense if `dequantize`), in its dtype.
        """
        base = self.linear
        fused = []
        for index in range(base.num_experts):
            fused.append(fused_module(self.expert(index), dequantize))
            mx.eval(fused[-1].parameters())
        kind = QuantizedSwitchLinear if "scales" in fused[0] else SwitchLinear
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        if kind is QuantizedSwitchLinear:
            for name in ("group_size", "bits", "mode", "global_scale"):
                setattr(module, name, getattr(base, name))
            module.biases = None
        for name in _ARRAYS:
            if name in fused[0]:
                setattr(module, name, mx.stack([one[name] for one in fused]))
        return module

    def _base_squares(self) -> mx.array:
        base = self.linear
        squares = []
        for index in range(base.num_experts):
            squares.append(row_squares(weight_of(one_expert(base, index))))
            mx.eval(squares[-1])
        return mx.stack(squares)


def one_expert(base: nn.Module, index: int) -> nn.Linear | nn.QuantizedLinear:
    """One of the experts as a linear layer."""
    kind = nn.QuantizedLinear if "scales" in base else nn.Linear
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    if "scales" in base:
        for name in ("group_size", "bits", "mode"):
            setattr(module, name, getattr(base, name))
    for name in _ARRAYS:
        if base.get(name) is not None:
            setattr(module, name, base[name][index])
    return module
