"""The kit for a GPU, up to the point where it needs one."""

import json
import os
import re
import struct
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
KIT = ROOT / "benchmarks" / "gpu"
SHELLS = sorted(KIT.glob("*.sh"))


def script(name: str) -> ModuleType:
    spec = util.spec_from_file_location(name, KIT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_a_shell_script_parses_and_names_scripts_that_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\$(?:GPU|here)/(\w+\.py)", text)
    assert all((KIT / name).is_file() for name in named), named
    for part in re.findall(r"--only ([a-z_ ]+)", text):
        gpu = (ROOT / ".ci" / "gpu.py").read_text(encoding="utf-8")
        assert all(f'"{name}"' in gpu for name in part.split())


def test_no_script_hides_a_package_of_others() -> None:
    """A script's folder comes first on the path: transformers imports `kernels`."""
    taken = {"kernels", "peft", "torch", "profile", "transformers"}
    assert not {path.stem for path in KIT.glob("*.py")} & taken


def run(name: str, *arguments: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, KIT / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "MLX_DISABLE_COMPILE": "1", **(env or {})},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_ops_are_checked_timed_and_written(tmp_path: Path) -> None:
    output = tmp_path / "ops.jsonl"
    said = run("op_times.py", "--tiny", "--group", "rows", "--output", output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 4
    assert len(said.splitlines()) == 4
    for line in lines:
        assert line["op"] == "normalize_rows"
        assert line["error"] == 0  # plain MLX in the kernel's place
        assert line["kernel_us"] > 0
        assert line["plain_us"] > 0
        assert line["copy_gbps"] > 0
        assert line["device"]["mlx"]


def test_whole_steps_are_measured_on_a_small_model(tmp_path: Path) -> None:
    output = tmp_path / "steps.jsonl"
    run("steps.py", "--tiny", "--ranks", 4, "--output", output)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    steps = {line["kind"]: line for line in lines if line["what"] == "step"}
    assert {*steps} == {"lora", "dora", "ours", "ours-plain"}
    assert steps["lora"]["over_lora"] == 1
    assert all(line["extra_mib"] > 0 for line in steps.values())
    assert steps["ours"]["decisions"]["kernels"] in ("reference", "auto")
    decode = [line["kind"] for line in lines if line["what"] == "decode"]
    assert decode == ["lora", "dora", "ours"]
    (losses,) = (line for line in lines if line["what"] == "losses")
    assert all(len(curve) == 20 for curve in losses["curves"].values())
    assert losses["same_bits_twice"]
    ours, theirs = losses["curves"]["ours"], losses["curves"]["dora"]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2)
    assert ours[-1] < ours[0]


def test_turns_come_one_after_another(tmp_path: Path) -> None:
    folder = tmp_path / "turns"
    code = (
        f"import sys, time; sys.path.insert(0, {str(KIT)!r}); import _turns; "
        "_turns.ready(); a = time.time(); time.sleep(0.3); "
        "print(a, time.time()); _turns.done()"
    )
    env = {**os.environ, "TURN_FOLDER": str(folder)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "TURN": name},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    said = run("_turns.py", 20, 10, "a", "b", env={"TURN_FOLDER": str(folder)})
    assert len(said.splitlines()) == 2
    spans = sorted(
        tuple(map(float, worker.communicate()[0].split())) for worker in workers
    )
    assert spans[0][1] <= spans[1][0]


def test_a_process_that_never_comes_ready_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.dead").touch()
    said = run("_turns.py", 0.2, 1, "gone", "late", env={"TURN_FOLDER": str(tmp_path)})
    assert said.strip() == "never ready: late"


def image(arch: int, body: bytes) -> bytes:
    head = struct.pack("<HHIQ", 2, 0, 64, len(body)).ljust(28, b"\0")
    return (head + struct.pack("<I", arch)).ljust(64, b"\0") + body


def test_only_the_code_of_one_architecture_is_kept() -> None:
    images = image(80, b"eighty") + image(90, b"ninety") + image(100, b"hundred")
    start = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(images))
    chance = b"\x50\xed\x55\xba" + b"\xff" * 20  # the same bytes by chance
    data = bytearray(b"before" + chance + start + images + b"after")
    size = len(data)
    assert script("shrink_cuda").shrink(data, 90) == len(b"eighty") + len(b"hundred")
    assert len(data) == size
    assert b"ninety" in data
    assert b"eighty" not in data
    assert b"hundred" not in data
    assert data.endswith(b"after")
