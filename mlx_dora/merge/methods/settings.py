"""Settings of a method for one tensor."""

from dataclasses import dataclass

import numpy as np

from mlx_dora.errors import DoRAError


def check_seed(seed: object) -> None:
    """Refuse what is no seed of MLX.

    Raises:
        DoRAError: With what came.
    """
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise DoRAError(
            f"seed must be a whole number of at least 0 and below 2^64, got {seed!r}."
        )


@dataclass(frozen=True, kw_only=True)
class TensorSettings:
    """How one tensor is merged.

    Attributes:
        weights: One an input, or one a row and input: ``(N,)`` or ``(rows, N)``.
        density: Share of the entries to keep, one an input; None for 1.
        normalize: Divide by the weights; None for the method's default.
        scale: λ on the merged task vectors.
        seed: Random seed of DARE.
        rescale: Divide what DARE keeps by its density.
    """

    weights: np.ndarray
    density: tuple[float, ...] | None = None
    normalize: bool | None = None
    scale: float = 1.0
    seed: int = 0
    rescale: bool = True

    def plain_weights(self) -> list[float]:
        """One weight an input.

        Raises:
            DoRAError: If they differ by row.
        """
        weights = self.weights
        if weights.ndim == 2:
            if np.ptp(weights, axis=0).any():
                raise DoRAError(
                    "expected one weight for each input here, got one for each row."
                )
            weights = weights[0]
        return [float(weight) for weight in weights]

    def normalizes(self, default: bool) -> bool:
        """Whether to divide by the weights, given the method's default."""
        return default if self.normalize is None else self.normalize
