"""``mlx_dora.doctor``: is this machine set up well, and does our code work on it."""

from mlx_dora.cli._echo import echo
from mlx_dora.cli._framework import verb


@verb("doctor")
def command() -> int:
    """Examine this machine: versions, BLAS, memory, layers, kernels, known traps.

    Takes under a minute. Exits with 1 if a layer or a kernel computes wrong results.
    """
    from mlx_dora.doctor.diagnosis import UNVERIFIED, diagnose

    diagnosis = diagnose()
    for title, rows in diagnosis.sections.items():
        echo(title)
        for label, value in rows:
            echo(f"  {label:<24} {value}")
    echo("Known traps")
    for trap in diagnosis.traps:
        echo(f"  - {trap}")
    echo(UNVERIFIED)
    return 0 if diagnosis.is_healthy else 1
