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
    took = f"{check.seconds:.1f} s"
    if check.is_right:
        return f"{check.dtype} right, {check.error:.0e}, {took}"
    if check.problem is not None and check.problem.startswith("does not run"):
        return f"{check.dtype} DOES NOT RUN"
    return f"{check.dtype} WRONG, {took}"


def timing_rows(examination: Examination) -> list[tuple[str, str]]:
    """Return each op's times by kernel and by plain MLX, and a copy's bandwidth."""
    rows = [("copy", f"{examination.copy_gbps:.0f} GB/s, 512 MB at a time")]
    rows += [
        (timing.name, _timing(timing, examination)) for timing in examination.timings
    ]
    return rows


def _timing(timing: OpTiming, examination: Examination) -> str:
    kernel, plain = timing.now.kernel_us, timing.now.plain_us
    if kernel is None or plain is None:
        return "no kernel; plain MLX is used"
    share = timing.gbps / examination.copy_gbps
    used = "the kernel" if timing.takes_kernel else "plain MLX"
    return (
        f"kernel {kernel:.0f} us ({timing.gbps:.0f} GB/s, {share:.0%} of copy), plain "
        f"MLX {plain:.0f} us; {used} is used; first call "
        f"{timing.now.first_seconds or 0:.1f} s"
    )


def choice_rows(examination: Examination) -> list[tuple[str, str]]:
    """Return how many kinds of calls take the kernel, by op."""
    rows = []
    ops = sorted({text.partition(" ")[0] for text in examination.choices})
    for op in ops:
        kept = [c for t, c in examination.choices.items() if t.partition(" ")[0] == op]
        taken = sum(choice.takes_kernel for choice in kept)
        rows.append((op, f"the kernel for {taken} of {len(kept)} measured kinds"))
    rows.append(("kept in", f"{examination.kept_in} (delete it to measure again)"))
    return rows
