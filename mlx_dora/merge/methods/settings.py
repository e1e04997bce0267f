"""Settings of a method for one tensor."""

from dataclasses import dataclass

import numpy as np

from mlx_dora.errors import DoRAError


def check_seed(seed: object) -> None:
    """Refuse a seed that MLX does not accept.

    Raises:
        DoRAError: With the given seed.
    """
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise DoRAError(
            f"seed must be a whole number of at least 0 and below 2^64, got {seed!r}."
        )


@dataclass(frozen=True, kw_only=True)
class TensorSettings:
    """Settings for merging one tensor.

    Attributes:
        weights: Weights of the inputs, shape ``(N,)``, or by row, shape ``(rows, N)``.
        density: Fraction of the entries to keep, one per input; None for 1.
        normalize: Divide by the weights' sum; None for the method's default.
        scale: Factor λ on the merged task vectors.
        seed: Random seed for DARE.
        rescale: Divide the entries that DARE keeps by the density.
    """

    weights: np.ndarray
    density: tuple[float, ...] | None = None
    normalize: bool | None = None
    scale: float = 1.0
    seed: int = 0
    rescale: bool = True

    def plain_weights(self) -> list[float]:
        """One weight per input.

        Raises:
            DoRAError: If the weights differ by row.
        """
        weights = self.weights
        if weights.ndim == 2:
            if np.ptp(weights, axis=0).any():
                raise DoRAError(
                    "this method needs one weight per input, got one per row."
                )
            weights = weights[0]
        return [float(weight) for weight in weights]

    def normalizes(self, default: bool) -> bool:
        """Whether to divide by the weights' sum, given the method's default."""
        return default if self.normalize is None else self.normalize
