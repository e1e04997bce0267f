"""Execute notebooks on the packaged model and fail if a cell fails.

    python notebooks/_run.py [NOTEBOOK ...]

The notebooks stay as they are: outputs are not stored.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
CELL_SECONDS = 600


def run(path: Path) -> None:
    """Execute one notebook in a fresh kernel, beside the others."""
    start = time.monotonic()
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=CELL_SECONDS, kernel_name="python3").execute()
    shown = sum(len(cell.get("outputs", ())) for cell in book.cells)
    print(f"ok {path.name}: {shown} outputs, {time.monotonic() - start:.0f} s")


def main() -> int:
    """Execute the named notebooks, or all."""
    chosen = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in chosen:
        try:
            run(path)
        except CellExecutionError as error:
            print(f"FAILED {path.name}\n{error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
