"""Formats the examination of the kernels as rows to print."""

from mlx_dora.doctor.examine import Examination, KernelCheck, OpTiming


def kernel_rows(examination: Examination) -> list[tuple[str, str]]:
    """Return which kernels this device uses and whether each is correct."""
    rows = [
        (
            "MLX_DORA_KERNELS",
            f"{examination.chosen}; this device has {examination.device}",
        )
    ]
    names = dict.fromkeys(check.name for check in examination.checks)
    for name in names:
        checks = [check for check in examination.checks if check.name == name]
        rows.append((name, "; ".join(map(_verdict, checks))))
    return rows


def _verdict(check: KernelCheck) -> str:
    if check.problem is not None:
        return f"{check.dtype} DOES NOT RUN"
    return f"{check.dtype} {'right' if check.is_right else 'WRONG'}, {check.error:.0e}"


def timing_rows(examination: Examination) -> list[tuple[str, str]]:
    """Return each op's times by kernel and by plain MLX, and a copy's bandwidth."""
    rows = [("copy", f"{examination.copy_gbps:.0f} GB/s")]
    rows += [
        (timing.name, _timing(timing, examination)) for timing in examination.timings
    ]
    return rows


def _timing(timing: OpTiming, examination: Examination) -> str:
    share = (
        f"({timing.gbps:.0f} GB/s, {timing.gbps / examination.copy_gbps:.0%} of copy)"
    )
    compiled = f"compiled {timing.compiled_ms:.2f} ms"
    plain = f"plain MLX {timing.plain_ms:.2f} ms"
    if timing.kernel_ms is None:
        return f"no kernel; {compiled} {share}; {plain}"
    gain = timing.compiled_ms / timing.kernel_ms
    return (
        f"kernel {timing.kernel_ms:.2f} ms {share}, {gain:.2f} times as fast as "
        f"compiled; {compiled}; {plain}"
    )
