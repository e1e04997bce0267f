"""Draw the terminal of a real run of the demo as `docs/assets/demo.svg`.

    python docs/_shoot_demo.py RECORDING

RECORDING is a file: the script plays it back if it exists, and otherwise runs
`mlx_dora.demo` on a terminal of 84 columns and records its output there. The picture
shows that output with the home folder as `~`. Times and long passages are left out,
marked by an ellipsis.
"""

import os
import pty
import re
import selectors
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ASSETS = Path(__file__).parent / "assets"
WIDTH = 84
SHOWN_STEPS = 1  # of the lines of training
SHOWN_ROWS = 4  # of the table of matrices
SHOWN_SAMPLES = 1

# As rich draws it, with the reader's own fonts instead of a font from the network.
FRAME = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" \
xmlns="http://www.w3.org/2000/svg" role="img" aria-label="Terminal of mlx_dora.demo">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, \
"DejaVu Sans Mono", monospace; font-size: {char_height}px; line-height: \
{line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" \
clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def record(file: Path) -> None:
    """Run the demo with its results on a terminal and its progress in a pipe."""
    main, terminal = pty.openpty()
    with tempfile.TemporaryDirectory() as folder, file.open("wb") as out:
        command = subprocess.Popen(
            ["mlx_dora.demo", "--output", str(Path(folder) / "demo")],
            stdout=terminal,
            stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"},
        )
        os.close(terminal)
        assert command.stderr is not None
        waiting = selectors.DefaultSelector()
        waiting.register(main, selectors.EVENT_READ)
        waiting.register(command.stderr.fileno(), selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                try:
                    some = os.read(key.fd, 4096)
                except OSError:  # Linux says so at the end of a terminal
                    some = b""
                if not some:
                    waiting.unregister(key.fd)
                out.write(some.replace(folder.encode(), b"."))
    if command.wait():
        raise SystemExit(f"the demo failed; see {file}")


def abridged(lines: list[str]) -> list[str]:
    """Return the lines to show: the start of each long passage, then an ellipsis."""
    passages = (
        (re.compile(r"step \d+/\d+"), SHOWN_STEPS),
        (re.compile(r" *model\.layers\."), SHOWN_ROWS),
        (re.compile(r"   (What|How)\b"), SHOWN_SAMPLES),
    )
    kept: list[str] = []
    seen = [0] * len(passages)
    hidden = False
    for line in lines:
        plain = re.sub(r"\x1b\[[\d;]*m", "", line)
        if plain.startswith("Done in"):
            break
        if re.match(r"   and \d+ more", plain):  # the ellipsis says so
            continue
        for at, (start, _) in enumerate(passages):
            if start.match(plain):
                seen[at] += 1
                hidden = seen[at] > passages[at][1]
                break
        else:
            hidden = hidden and plain.startswith("     ")  # what belongs to a sample
        if not hidden:
            kept.append(line)
        elif kept[-1].strip() != "…":
            kept.append("   …")
    return kept


def main() -> None:
    """Record if needed, and draw."""
    recording = Path(sys.argv[1])
    if not recording.exists():
        record(recording)
    text = recording.read_text(encoding="utf-8").replace("\r\n", "\n")
    text = text.replace(str(Path.home()), "~")
    text = re.sub(r" (\d+:)?\d+:\d\d(?=,)", " …", text)
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print("[bold]$[/] mlx_dora.demo")
    for line in abridged(text.splitlines()):
        console.print(Text.from_ansi(line))
    console.save_svg(
        str(ASSETS / "demo.svg"),
        title="mlx_dora.demo",
        theme=MONOKAI,
        code_format=FRAME,
        unique_id="demo",
    )


if __name__ == "__main__":
    main()
