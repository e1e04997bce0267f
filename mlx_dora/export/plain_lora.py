r"""Approximates a DoRA adapter by a LoRA adapter, which more hosts can read.

.. math:: W' - W_0 = (g - 1) \circ W_0 + g \circ s\,BA, \qquad g = m / n

The first term has the rank of W0, so no LoRA equals it; the nearest one of rank R is
the truncated singular value decomposition of the sum (Eckart and Young, 1936).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.adapter import Adapter, ranks_in
from mlx_dora.adapters.attach import fit_problems
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.key_form import with_key_form
from mlx_dora.adapters.matrices import (
    adapted_matrices,
    adapter_tensors,
    named_matrices,
)
from mlx_dora.adapters.refusals import check_cut
from mlx_dora.errors import DoRAError
from mlx_dora.io.finite import refuse_not_finite
from mlx_dora.matrix.low_rank import Adapted
from mlx_dora.matrix.subspace import principal_part, residual_energy
from mlx_dora.matrix.terms import exact_gain
from mlx_dora.matrix.weight import Weight, row_blocks, weight_of
from mlx_dora.notebook import Shown
from mlx_dora.progress import Progress

DEFAULT_RANK = 64


@dataclass(frozen=True, kw_only=True)
class ConvertedLayer:
    """Report on one converted matrix.

    Attributes:
        path: Full path of the matrix; for an expert, with its index: ``path[3]``.
        error: ‖W'' − W'‖ over ‖W' − W0‖, Frobenius norms: the share of the adapter's
            change that the LoRA misses. W'' is the weight with LoRA.
        magnitude: ‖(g − 1)∘W0‖ over ‖W' − W0‖: the change that no rank captures well.
        passes: How often W0 was read; 0 if nothing had to be approximated.
    """

    path: str
    error: float
    magnitude: float
    passes: int


@dataclass(frozen=True, kw_only=True)
class ConvertedLoss:
    """Mean loss per target token of the base, the adapter and the LoRA on data."""

    base: float
    adapter: float
    lora: float


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRAConversion(Shown):
    """A LoRA adapter made from another adapter, and what it costs.

    Attributes:
        adapter: The LoRA adapter.
        layers: One report for each matrix, in natural order.
        loss: Losses on data, if measured.
    """

    adapter: Adapter
    layers: tuple[ConvertedLayer, ...]
    loss: ConvertedLoss | None = None

    def details(self) -> list[str]:
        """One line for each matrix."""
        return [
            f"{layer.path}: misses {layer.error:.2%} of the change (magnitudes alone "
            f"are {layer.magnitude:.2%} of it), {layer.passes} passes"
            for layer in self.layers
        ]

    def lines(self) -> list[str]:
        """The summary as text."""
        worst = max(self.layers, key=lambda layer: layer.error)
        mean = sum(layer.error for layer in self.layers) / len(self.layers)
        text = [
            f"LoRA of rank {self.adapter.config.rank}: {len(self.layers)} matrices, "
            f"which miss {mean:.2%} of the adapter's change on average, "
            f"{worst.error:.2%} at most ({worst.path})."
        ]
        if (loss := self.loss) is not None:
            text.append(
                f"Loss on the data: base {loss.base:.4f}, adapter {loss.adapter:.4f}, "
                f"LoRA {loss.lora:.4f} ({loss.lora - loss.adapter:+.4f})."
            )
        return text

    def facts(self) -> dict[str, Any]:
        """Return rank, number of matrices and largest error."""
        return {
            "rank": self.adapter.config.rank,
            "matrices": len(self.layers),
            "largest_error": max(layer.error for layer in self.layers),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return the matrices."""
        return [asdict(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the adapter."""
        return {
            "layers": self.table(),
            "loss": None if self.loss is None else asdict(self.loss),
        }


def to_lora(
    adapter: Adapter,
    model: nn.Module,
    rank: int = DEFAULT_RANK,
    *,
    progress: Progress | None = None,
) -> LoRAConversion:
    """Return the LoRA adapter nearest to a DoRA adapter, matrix by matrix.

    The squared error of each matrix is within 0.1 % of the least possible. W0 is read
    in blocks of rows, packed or not; no dense copy is made. A LoRA adapter of at most
    this rank comes back unchanged.

    Args:
        adapter: A DoRA or LoRA adapter.
        model: Its base, without adapters.
        rank: Rank of the LoRA. Limited to min(out, in) for each matrix.
        progress: Called after each module.

    Raises:
        DoRAError: If the adapter does not fit the model, is a full fine-tuning, or the
            rank is above min(out, in) of every matrix.
    """
    if adapter.fine_tune_type == "full":
        raise DoRAError(
            "the adapter is a full fine-tuning; make a LoRA of it with extract."
        )
    if type(rank) is not int or rank < 1:
        raise DoRAError(f"rank must be a whole number of at least 1, got {rank!r}.")
    if problems := fit_problems(model, adapter):
        raise DoRAError(f"the adapter does not fit the model: {'; '.join(problems)}.")
    modules = dict(model.named_modules())
    own_rank = max(adapter.config.ranks_of(adapter.paths).values())
    if adapter.fine_tune_type == "lora" and own_rank <= rank:
        return LoRAConversion(
            adapter=adapter, layers=tuple(_unchanged(adapter, modules))
        )
    check_cut(modules, adapter.paths, rank)
    tensors: dict[str, mx.array] = {}
    layers: list[ConvertedLayer] = []
    for path in adapter.paths:
        module = modules[path]
        weight, parts = weight_of(module), []
        matrices = adapted_matrices(adapter, path, module)
        for (name, matrix), adapted in zip(
            named_matrices(path, weight), matrices, strict=True
        ):
            part, layer = _nearest(name, matrix, adapted, rank)
            parts.append(part)
            layers.append(layer)
        tensors |= adapter_tensors(path, module, weight, parts)
        if progress is not None:
            progress("convert", len(adapter.paths), 1)
    refuse_not_finite(tensors, "the LoRA adapter")
    config = DoRAConfig(scale=1.0, dropout=adapter.config.dropout)
    config = with_key_form(config.with_ranks(ranks_in(tensors)), model)
    history = {"converted": {"from": adapter.fine_tune_type, "rank": rank}}
    lora = replace(
        adapter,
        config=config,
        tensors=tensors,
        fine_tune_type="lora",
        training={**(adapter.training or {}), **history},
    )
    return LoRAConversion(adapter=lora, layers=tuple(layers))


def _unchanged(
    adapter: Adapter, modules: dict[str, nn.Module]
) -> Iterator[ConvertedLayer]:
    for path in adapter.paths:
        for name, _ in named_matrices(path, weight_of(modules[path])):
            yield ConvertedLayer(path=name, error=0.0, magnitude=0.0, passes=0)


def _nearest(
    name: str, weight: Weight, adapted: Adapted, rank: int
) -> tuple[dict[str, mx.array], ConvertedLayer]:
    """Return the factors nearest to a matrix's change, and the report."""
    out, width = weight.shape[0], weight.shape[1]
    gain = mx.ones((out,)) if adapted.m is None else exact_gain(weight, adapted)

    def change() -> Iterator[tuple[slice, mx.array]]:
        for index, block in row_blocks(weight):
            g = gain[index][:, None]
            yield (
                index,
                (g - 1) * block.astype(mx.float32) + g * adapted.update.rows(index),
            )

    def magnitude() -> Iterator[tuple[slice, mx.array]]:
        for index, block in row_blocks(weight):
            yield index, (gain[index][:, None] - 1) * block.astype(mx.float32)

    rank = min(rank, out, width)
    part = principal_part(change, (out, width), rank, key=mx.random.key(0))
    lora_a, lora_b = part.factors(rank)
    energy = part.energy or 1.0
    rest = residual_energy(change, lora_a, lora_b)
    zero_a, zero_b = mx.zeros((width, 1)), mx.zeros((1, out))
    alone = residual_energy(magnitude, zero_a, zero_b)
    layer = ConvertedLayer(
        path=name,
        error=(rest / energy) ** 0.5,
        magnitude=(alone / energy) ** 0.5,
        passes=part.passes + 2,
    )
    return {"lora_a": lora_a, "lora_b": lora_b}, layer
