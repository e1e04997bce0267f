"""Print the Homebrew formula of a built wheel: formula.py dist/mlx_dora-X-....whl."""

import hashlib
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parent / "mlx-dora.rb"


def formula(wheel: Path) -> str:
    """Return the formula with the version and digest of a wheel."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.replace("@VERSION@", wheel.name.split("-")[1]).replace(
        "@SHA256@", digest
    )


if __name__ == "__main__":
    print(formula(Path(sys.argv[1])), end="")
