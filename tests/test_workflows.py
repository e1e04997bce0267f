"""The workflows of the repository's host, which run nowhere before it is public."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a job finds on its machine, and what its steps install.
HOST = {"cd", "cp", "grep", "pip", "python", "uv", ".venv/bin/python"}
INSTALLED = {"pytest", "ruff", "pyright", "mkdocs", "twine"}
RUNNERS = {"ubuntu-latest", "macos-15", "macos-26"}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.stem}/{name}", job)
        for path in FILES
        for name, job in load(path)["jobs"].items()
    ]


def commands(job: dict[str, Any]) -> list[list[str]]:
    """The commands of a job's steps, one list of words each."""
    found: list[list[str]] = []
    for step in job["steps"]:
        text = re.sub(r"\$\{\{.*?\}\}|\$\([^)]*\)", "X", step.get("run", ""))
        for line in text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for word in [*lexer, ";"]:
                if word in ("&&", "|", "||", ";"):
                    found += [words] if words else []
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)
    return found


def runners(job: dict[str, Any]) -> list[str]:
    runs_on = job["runs-on"]
    if not runs_on.startswith("${{"):
        return [runs_on]
    name = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", runs_on)
    assert name is not None
    return job["strategy"]["matrix"][name[1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_has_a_name_a_trigger_and_least_permissions(path: Path) -> None:
    content: dict[Any, Any] = load(path)
    assert content["name"]
    assert content[True]  # YAML 1.1 reads the key `on` so
    assert content["permissions"] == {"contents": "read"}


@pytest.mark.parametrize(("name", "job"), jobs())
def test_a_job_has_a_known_machine_and_an_end(name: str, job: dict[str, Any]) -> None:
    assert set(runners(job)) <= RUNNERS
    assert 1 <= job["timeout-minutes"] <= 120
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step), step
        assert re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize(("name", "job"), jobs())
def test_every_command_of_a_job_exists(name: str, job: dict[str, Any]) -> None:
    scripts = {*PROJECT["scripts"]}
    for words in commands(job):
        command = words[0]
        if command.startswith(".ci/"):
            path = ROOT / command
            assert path.is_file()
            assert path.stat().st_mode & 0o111, f"{command} is not executable"
        else:
            known = {*HOST, *INSTALLED, *scripts}
            assert command in known or command.startswith("/tmp/"), command


@pytest.mark.parametrize(("name", "job"), jobs())
def test_every_file_and_extra_that_a_job_names_exists(
    name: str, job: dict[str, Any]
) -> None:
    extras = {*PROJECT["optional-dependencies"]}
    for words in commands(job):
        for word in words[1:]:
            if match := re.fullmatch(r"\.\[([\w,]+)\]", word):
                assert set(match[1].split(",")) <= extras, word
            elif re.fullmatch(r"(?:\.ci|docs|packaging|tests|mlx_dora)/[\w./]+", word):
                assert (ROOT / word).exists(), word


def mac_job() -> dict[str, Any]:
    return load(FOLDER / "ci.yml")["jobs"]["macos"]


def test_macs_of_two_systems_run_the_check_under_validation() -> None:
    job = mac_job()
    assert runners(job) == ["macos-15", "macos-26"]
    assert job["strategy"]["fail-fast"] is False
    assert ["python", ".ci/gpu.py", "gpu-report"] in commands(job)
    validated = [
        step["run"].split()[:2]
        for step in job["steps"]
        if str(step.get("env", {}).get("METAL_DEVICE_WRAPPER_TYPE")) == "1"
    ]
    assert validated == [["python", ".ci/ten_steps.py"], ["pytest"]]
    (upload,) = (s for s in job["steps"] if "upload-artifact" in s.get("uses", ""))
    assert upload["if"] == "always()"  # also of a failed check
    assert upload["with"]["path"] == "gpu-report/"
    assert "${{ matrix.os }}" in upload["with"]["name"]  # names may not repeat


def check() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu", ROOT / ".ci" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_the_check_names_tests_and_scripts_that_exist() -> None:
    gpu = check()
    names = [part.name for part in gpu.PARTS]
    assert names == ["doctor", "grid", "layers", "kernels", "train", "ten_steps"]
    for part in gpu.PARTS:
        for word in part.command:
            path = word.removeprefix("--ignore=")
            if path.startswith(("tests/", ".ci/")):
                assert (ROOT / path).exists(), path
    # A job has time for all parts.
    minutes = sum(part.limit_s for part in gpu.PARTS) / 60
    assert minutes <= mac_job()["timeout-minutes"]


def test_the_check_reports_a_failed_part_and_goes_on(tmp_path: Path) -> None:
    gpu = check()
    good = gpu.Part(name="good", command=("-c", "print('fine')"), limit_s=60)
    bad = gpu.Part(name="bad", command=("-c", "raise SystemExit(3)"), limit_s=60)
    slow = gpu.Part(
        name="slow", command=("-c", "import time; time.sleep(60)"), limit_s=1
    )
    results = [gpu.run(part, tmp_path) for part in (bad, slow, good)]
    assert [result.status for result in results] == [3, 124, 0]
    assert results[2].last_line == "fine"
    assert gpu.shortened(f"Saved {Path.home()}/x") == "Saved ~/x"
    assert (tmp_path / "good.txt").read_text() == "fine\n"


def test_a_part_on_a_mac_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = check()
    show = "import os; print(os.environ.get('METAL_DEVICE_WRAPPER_TYPE'))"
    monkeypatch.setattr(gpu.sys, "platform", "darwin")
    monkeypatch.delenv("METAL_DEVICE_WRAPPER_TYPE", raising=False)
    for is_validated, said in ((True, "1"), (False, "None")):
        part = gpu.Part(
            name="env", command=("-c", show), limit_s=60, is_validated=is_validated
        )
        assert gpu.run(part, tmp_path).last_line == said


def test_without_a_gpu_the_check_says_so() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "gpu.py", "unused"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 2:
        assert "MLX has no GPU here" in done.stdout
        assert not Path("unused").exists()
