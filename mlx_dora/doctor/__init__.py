"""The checks of ``mlx_dora.doctor`` on the machine it runs on."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.doctor.diagnosis import Diagnosis, diagnose

_HOME = {
    "Diagnosis": "mlx_dora.doctor.diagnosis",
    "diagnose": "mlx_dora.doctor.diagnosis",
}

__all__ = ["Diagnosis", "diagnose"]

__getattr__, __dir__ = public_names(__name__, _HOME)
