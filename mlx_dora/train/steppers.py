"""Maps each variant to its stepper."""

from mlx_dora.adapters.config import Variant
from mlx_dora.train.bilevel import BilevelStepper
from mlx_dora.train.ranks import AdaptiveStepper
from mlx_dora.train.stepper import Stepper

_STEPPERS: dict[Variant, type[Stepper]] = {
    "adaptive": AdaptiveStepper,
    "bidora": BilevelStepper,
}


def stepper_class(variant: Variant) -> type[Stepper]:
    """The stepper class of a variant; `Stepper` unless the variant needs its own."""
    return _STEPPERS.get(variant, Stepper)
