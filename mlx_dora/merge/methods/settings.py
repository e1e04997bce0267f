"""Settings of a method for one tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        rescale: Make up for dropped entries by rescaling the rest; None for the
            method's default.
        as_mergekit: Where mergekit differs from the method's paper, follow mergekit.
        own: The method's own parameters by name (`MergeMethod.own`): a value, or a
            tuple with one value per input.
    """

    weights: np.ndarray
    density: tuple[float, ...] | None = None
    normalize: bool | None = None
    scale: float = 1.0
    seed: int = 0
    rescale: bool | None = None
    as_mergekit: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)

    def plain_weights(self) -> list[float]:
        """One weight per input.

        Raises:
            DoRAError: If the weights differ by row.
        """
        weights = np.atleast_2d(self.weights)
        if np.ptp(weights, axis=0).any():
            raise DoRAError("this method needs one weight per input, got one per row.")
        return weights[0].tolist()

    def densities(self) -> list[float]:
        """One density per input.

        Raises:
            DoRAError: If a density is not between 0 and 1, or their number is wrong.
        """
        count = self.weights.shape[-1]
        given = self.density or (1.0,) * count
        if len(given) != count or not all(0 <= share <= 1 for share in given):
            raise DoRAError(
                f"density must be a share from 0 to 1 for each of {count} inputs, got "
                f"{given}."
            )
        return list(given)

    def normalizes(self, default: bool) -> bool:
        """Whether to divide by the weights' sum, given the method's default."""
        return default if self.normalize is None else self.normalize

    def rescales(self, default: bool) -> bool:
        """Whether to rescale what is kept, given the method's default."""
        return default if self.rescale is None else self.rescale
