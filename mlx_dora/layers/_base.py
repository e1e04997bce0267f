"""The weight of the module that a DoRA layer wraps."""

import mlx.nn as nn

from mlx_dora.matrix.weight import Weight, weight_from


def weight_of(base: nn.Module) -> Weight:
    """Return a base module's weight, dense or packed; a stack for experts or heads.

    Raises:
        DoRAError: If the weight is packed with a global scale.
    """
    return weight_from(base, base)
