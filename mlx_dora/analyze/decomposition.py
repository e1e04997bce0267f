"""`DoRADecomposition`: weights as magnitude and direction, and their changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_dora.analyze.finetune import Weights, analyze_finetune
from mlx_dora.analyze.result import AdaptationAnalysis
from mlx_dora.decomposition import as_array, dora_decompose
from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class DoRAComponents:
    """Weights decomposed row by row (Eq. 2 of DoRA, arXiv:2402.09353).

    Attributes:
        magnitudes: Map from name to m, shape ``(out,)``, float32.
        directions: Map from name to V̂, shape ``(out, in)``, in the dtype of the
            weight. Rows have length 1 or 0.
    """

    magnitudes: dict[str, mx.array] = field(repr=False)
    directions: dict[str, mx.array] = field(repr=False)


class DoRADecomposition:
    """Decomposition of weights into magnitude and direction.

    Args:
        eps: Added to the divisor of a direction; 0 keeps unit length.
    """

    def __init__(self, eps: float = 0.0) -> None:
        if not eps >= 0:
            raise DoRAError(f"eps must be at least 0, got {eps}.")
        self.eps = eps

    def decompose(self, weights: Weights) -> DoRAComponents:
        """Decompose every float matrix; skip vectors.

        Args:
            weights: Named arrays, or a model folder.

        Raises:
            DoRAError: If there is no float matrix.
        """
        arrays = weights
        if isinstance(weights, str | Path):
            files = Checkpoint(weights)
            arrays = {name: files.tensor(name) for name in files.names}
        if not isinstance(arrays, Mapping):
            raise TypeError(
                "weights must map names to arrays, or be a model folder, got "
                f"{type(arrays).__name__}."
            )
        magnitudes, directions = {}, {}
        for name, given in arrays.items():
            value = as_array(name, given)
            if value.ndim == 2 and mx.issubdtype(value.dtype, mx.floating):
                magnitudes[name], directions[name] = dora_decompose(value, self.eps)
                mx.eval(magnitudes[name], directions[name])
        if not magnitudes:
            raise DoRAError("the weights hold no float matrix to decompose.")
        return DoRAComponents(magnitudes=magnitudes, directions=directions)

    def analyze_adaptation(
        self, base_weights: Weights, adapted_weights: Weights
    ) -> AdaptationAnalysis:
        """Analyze how weights changed: per-layer statistics, correlation, guidance.

        Args:
            base_weights: Named arrays, or a model folder.
            adapted_weights: The same names and shapes after fine-tuning.

        Raises:
            DoRAError: As for `analyze_finetune`.
        """
        return analyze_finetune(base_weights, adapted_weights)
