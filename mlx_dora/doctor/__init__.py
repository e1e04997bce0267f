"""The checks of ``mlx_dora.doctor`` on the machine it runs on."""

from mlx_dora.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
