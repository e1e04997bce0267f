"""Which stepper trains which variant."""

from mlx_dora.adapters.config import Variant
from mlx_dora.train.bilevel import BilevelStepper
from mlx_dora.train.ranks import AdaptiveStepper
from mlx_dora.train.stepper import Stepper

_STEPPERS: dict[Variant, type[Stepper]] = {
    "adaptive": AdaptiveStepper,
    "bidora": BilevelStepper,
}


def stepper_class(variant: Variant) -> type[Stepper]:
    """The stepper of a variant; the plain one where the variant needs no other."""
    return _STEPPERS.get(variant, Stepper)
