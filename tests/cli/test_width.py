"""What commands print fits a terminal of 80 columns."""

import fcntl
import os
import re
import struct
import termios
from pathlib import Path

import pytest

from tests.cli.material import make_material
from tests.processes import Process

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LINES = (
    """
train --model m0 --data data --iters 4 --rank 4 --num-layers 2 --mask-prompt
    --steps-per-report 1 --learning-rate 1.234e-5 --adapter-path trained
evaluate --adapter-path a1 --data data --max-tokens 90
fuse --adapter-path a1 --save-path fused --verify
extract m0 m1 --rank 2 --save-path extracted
convert a1 to-peft
merge adapters a1 a2 --save-path merged --rank 3
merge models m0 m1 --save-path models
analyze adapter a1
analyze compare a1 a2
analyze models m0 m1
doctor
""".strip()
    .replace("\n    ", " ")
    .splitlines()
)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("width") / "m", fisher=False)


def on_a_terminal(folder: Path, words: list[str]) -> str:
    """Return what a command prints on a terminal of 80 columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = Process(
        ["-m", "mlx_dora", *words],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm", "PYTHONPATH": str(Path.cwd())},
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # Linux's end of file: the terminal was closed
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("line", LINES)
def test_no_line_is_wider_than_80_columns(material: Path, line: str) -> None:
    shown = on_a_terminal(material, line.split())
    lines = re.split("[\r\n]", ANSI.sub("", shown))
    wide = [text for text in lines if len(text) > 80]
    # Warnings and errors stay on one line, for scripts that look for them.
    assert [text for text in wide if not text.startswith("warning: ")] == []
