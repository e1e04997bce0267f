"""The weight of the module that a DoRA layer wraps."""

import mlx.nn as nn

from mlx_dora.matrix.weight import Weight, weight_from


def weight_of(base: nn.Module) -> Weight:
    """The weight of a base module, dense or packed; of experts or heads, a stack.

    Raises:
        DoRAError: If it is packed with a global scale.
    """
    return weight_from(base, base)
