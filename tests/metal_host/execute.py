"""Running one dispatch in a program of its own, and reading what was found."""

import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.metal_host.records import Dispatch, Record

# Bits of Dispatch::flags in runtime/dispatch.h.
MISALIGN, HEAP, ZERO_PAGES, FLUSH_DENORMALS, COUNT = 1, 2, 4, 8, 16

_SHARED_MEMORY = Path("/dev/shm")
_TIME_LIMIT = 300
_OUTPUT_END = 1 << 20  # bytes that come back of a larger output with ZERO_PAGES


@dataclass(frozen=True)
class Traffic:
    """Bytes moved to and from one buffer, and how many of its bytes took part."""

    read: int
    read_once: int
    written: int
    written_once: int


@dataclass(frozen=True)
class Sparse:
    """A huge array of which only `values`, from element `start` on, are not zero."""

    shape: tuple[int, ...]
    start: int
    values: mx.array


@dataclass
class Outcome:
    """What came of a dispatch.

    Attributes:
        outputs: Raw outputs; none if the program crashed.
        findings: Text of the first finding of each kind; empty when all is well.
        threadgroup_bytes: The most threadgroup memory a threadgroup used.
        traffic: Per buffer, in order of the kernel's parameters, with `COUNT`.
    """

    outputs: list[mx.array] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)
    threadgroup_bytes: int = 0
    traffic: list[Traffic] = field(default_factory=list)


def raw_bytes(array: mx.array) -> bytes:
    """The array's memory, row-contiguous."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array)).tobytes()


def from_bytes(raw: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array of this shape and dtype with these bytes."""
    if dtype == mx.bfloat16:
        return mx.array(np.frombuffer(raw, np.uint16).reshape(shape)).view(dtype)
    carrier = np.dtype(str(dtype).removeprefix("mlx.core."))
    return mx.array(np.frombuffer(raw, carrier).reshape(shape))


def _buffer(output: bool, item: int, size: int, start: int, data: bytes) -> bytes:
    return struct.pack("=IIQQQ", output, item, size, start, len(data)) + data


def _job(
    dispatch: Dispatch,
    sparse: dict[int, Sparse],
    seed: int,
    flags: int,
    groups: tuple[int, int],
) -> bytes:
    record = dispatch.record
    buffers = []
    for i, ((shape, dtype), extras) in enumerate(
        zip(record.inputs, record.extras, strict=True)
    ):
        size = prod(shape) * dtype.size
        if i in sparse:
            start, data = sparse[i].start * dtype.size, raw_bytes(sparse[i].values)
        else:
            start, data = 0, raw_bytes(dispatch.inputs[i])
            assert len(data) == size
        buffers.append(_buffer(False, dtype.size, size, start, data))
        if not shape:
            continue
        strides = [prod(shape[k + 1 :]) for k in range(len(shape))]
        given = (
            np.array(shape, np.int32),
            np.array(strides, np.int64),
            np.array([len(shape)], np.int32),
        )
        for wanted, value in zip(extras, given, strict=True):
            if wanted:
                data = value.tobytes()
                buffers.append(_buffer(False, value.itemsize, len(data), 0, data))
    for shape, dtype in record.outputs:
        data = b""
        if dispatch.init_value is not None:
            data = raw_bytes(mx.full(shape, dispatch.init_value, dtype))
        buffers.append(_buffer(True, dtype.size, prod(shape) * dtype.size, 0, data))
    name = record.key.encode()
    head = struct.pack("=I", len(name)) + name
    head += struct.pack(
        "=3I3I4I", *record.grid, *record.threadgroup, *groups, seed, flags
    )
    return head + struct.pack("=I", len(buffers)) + b"".join(buffers)


def execute(
    program: Path,
    dispatch: Dispatch,
    *,
    seed: int = 0,
    flags: int = 0,
    groups: tuple[int, int] = (0, 0xFFFFFFFF),
    sparse: dict[int, Sparse] | None = None,
) -> Outcome:
    """Run one dispatch.

    Args:
        program: Built from the dispatch's record.
        dispatch: The record and its inputs.
        seed: Order of the threads: 0 forward, 1 backward, else shuffled.
        flags: Of `MISALIGN`, `HEAP`, `ZERO_PAGES`, `FLUSH_DENORMALS`, `COUNT`.
            With `ZERO_PAGES` an output over 1 MiB comes back as its last MiB, flat.
        groups: Run only these threadgroups (half open, linear).
        sparse: Inputs, by position, that are too large to hold.
    """
    place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="metal_host-", dir=place) as folder:
        files = [Path(folder) / name for name in ("job", "outputs", "report")]
        files[0].write_bytes(_job(dispatch, sparse or {}, seed, flags, groups))
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        environment |= {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "halt_on_error=1",
        }
        try:
            done = subprocess.run(
                [str(program), *map(str, files)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=environment,
                timeout=_TIME_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Outcome(findings={"timeout": f"over {_TIME_LIMIT} s"})
        if done.returncode not in (0, 4):
            return Outcome(findings=_crash(done.returncode, done.stderr))
        outcome = _report(program, files[2].read_text())
        ends = bool(flags & ZERO_PAGES)
        outcome.outputs = _outputs(dispatch.record, files[1].read_bytes(), ends)
        return outcome


def _crash(code: int, complaint: str) -> dict[str, str]:
    kind = "crash"
    if found := re.search(r"AddressSanitizer: ([\w-]+)", complaint):
        kind = f"asan-{found[1]}"
    elif "runtime error" in complaint:
        kind = "ubsan-misaligned" if "misaligned" in complaint else "ubsan"
    return {kind: f"exit status {code}: {complaint[:1500]}"}


def _report(program: Path, text: str) -> Outcome:
    outcome = Outcome()
    for line in text.splitlines():
        kind, *fields = line.split("\t")
        if kind == "threadgroup_bytes":
            outcome.threadgroup_bytes = int(fields[0])
        elif kind == "finding":
            outcome.findings[fields[0]] = _with_line(program, fields[2])
        else:
            outcome.traffic.append(Traffic(*map(int, fields[1:])))
    return outcome


def _with_line(program: Path, text: str) -> str:
    found = re.search(r"\[pc (0x[0-9a-f]+)\]", text)
    if not found:
        return text
    address = hex(int(found[1], 16) - 1)
    command = ["addr2line", "-e", str(program), address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return text
    return f"{text[: found.start()]}at {Path(done.stdout.strip()).name}"


def _outputs(record: Record, raw: bytes, ends: bool) -> list[mx.array]:
    outputs = []
    for shape, dtype in record.outputs:
        size = prod(shape) * dtype.size
        if ends and size > _OUTPUT_END:
            size = _OUTPUT_END
            shape = (size // dtype.size,)
        outputs.append(from_bytes(raw[:size], shape, dtype))
        raw = raw[size:]
    return outputs
