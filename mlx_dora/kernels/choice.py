"""Chooses between kernel and plain MLX: a look-up at each call, never a measurement.

The choices of this process come from the file of `kept`, and from `measure`, which runs
before training and after loading a model. A case without a choice runs plain MLX.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_dora.kernels._source import source_folder
from mlx_dora.kernels.case import Case
from mlx_dora.kernels.dispatch import chosen_mode, device_backend
from mlx_dora.kernels.kept import Choices, read_kept
from mlx_dora.kernels.trial import Choice, Job, check, report

JobOf = Callable[[Case], Job]

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_MAX_RANK = 512  # B's rows in threadgroup memory


class _Table:
    """Choices of this process.

    Attributes:
        choices: By `Case.text`, as kept and measured; None before the first look-up.
        pinned: Decisions of a training in progress, which alone count then.
        chosen: Answers given so far.
        forced: Answers given so far to calls with a forced kernel.
        seen: Cases looked up, while they are recorded.
    """

    def __init__(self) -> None:
        self.choices: Choices | None = None
        self.pinned: Mapping[str, bool] | None = None
        self.chosen: dict[Case, bool] = {}
        self.forced: dict[Case, bool] = {}
        self.seen: list[Case] | None = None


_TABLE = _Table()


def forget() -> None:
    """Forget all choices of this process, so that they are read again."""
    _TABLE.__init__()
    device_facts.cache_clear()


def takes_kernel(case: Case, job: JobOf) -> bool:
    """Return whether to use the kernel for a call, by ``MLX_DORA_KERNELS``.

    With ``auto``, this reads the choices. A kernel that is named is compared with plain
    MLX on the first call of each case, and taken if it is right.

    Args:
        case: The call.
        job: Makes both sides of a case.
    """
    mode = chosen_mode()
    return mode != "reference" and takes_on_gpu(mode == "forced", case, job)


def takes_on_gpu(is_forced: bool, case: Case, job: JobOf) -> bool:
    """Return `takes_kernel` where the device has kernels and may use them."""
    if _TABLE.seen is not None:
        if _is_possible(case):
            _TABLE.seen.append(case)
        return False
    answers = _TABLE.forced if is_forced else _TABLE.chosen
    answer = answers.get(case)
    if answer is None:
        right = _is_right(case, job) if is_forced else _is_chosen(case)
        answer = answers[case] = right
    return answer


def _is_possible(case: Case) -> bool:
    return (
        case.rows > 0
        and case.columns > 0
        and case.rank <= _MAX_RANK
        and case.dtype in _DTYPES
    )


def _is_chosen(case: Case) -> bool:
    if not _is_possible(case):
        return False
    decisions = _TABLE.pinned
    if decisions is None:
        decisions = {text: kept.takes_kernel for text, kept in choices().items()}
    return all(decisions.get(point.text, False) for point in case.points())


def _is_right(case: Case, job: JobOf) -> bool:
    if not _is_possible(case):
        return False
    checked = check(case, job(case))
    report(case, checked)
    return checked.takes_kernel


@contextmanager
def recorded_cases() -> Iterator[list[Case]]:
    """Yield a list that receives the case of each call inside, which runs plain MLX."""
    _TABLE.seen = seen = []
    try:
        yield seen
    finally:
        _TABLE.seen = None


def choices() -> Choices:
    """Return the choices known for this device, kept or measured."""
    if _TABLE.choices is None:
        _TABLE.choices = read_kept(device_text())
    return _TABLE.choices


def read_again() -> None:
    """Read the file again, for what other processes have kept since."""
    _TABLE.choices = {**(_TABLE.choices or {}), **read_kept(device_text())}
    _TABLE.chosen.clear()


def add_choices(new: Mapping[str, Choice]) -> None:
    """Add choices for the calls from now on."""
    _TABLE.choices = {**choices(), **new}
    _TABLE.chosen.clear()


def pin(decisions: Mapping[str, bool] | None) -> None:
    """Take only these decisions, by `Case.text`; None takes the choices again."""
    _TABLE.pinned = decisions
    _TABLE.chosen.clear()


@lru_cache
def device_facts() -> dict[str, str]:
    """Return what choices depend on: chip, memory, MLX and the text of the kernels.

    On a CPU, which has no kernels, these are the backend, the chip and MLX.
    """
    info = mx.device_info(mx.default_device())
    memory = info.get("memory_size") or info.get("total_memory") or 0
    names = (str(info.get(name, "")) for name in ("device_name", "architecture"))
    facts = {
        "backend": device_backend(),
        "chip": " ".join(filter(None, names)),
        "mlx": version("mlx"),
    }
    if facts["backend"] == "reference":
        return facts
    return {
        **facts,
        "memory": f"{round(int(memory) / 2**30)} GiB" if memory else "",
        "kernels": _digest(),
    }


def device_text() -> str:
    """Return `device_facts` as text: the device's key in the file."""
    return ", ".join(f"{name} {value}" for name, value in device_facts().items())


def _digest() -> str:
    """Hash the Metal sources and this package: launches and plain MLX count too."""
    total = hashlib.sha256()
    files = [*source_folder().glob("*.metal"), *source_folder().glob("*.h")]
    files += Path(__file__).parent.glob("*.py")
    for path in sorted(files, key=lambda file: file.name):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
