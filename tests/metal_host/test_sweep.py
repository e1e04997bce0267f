"""The generic sweep: at least 95 % of the changes are seen; the rest do nothing."""

import re

import pytest

from mlx_dora.kernels._source import HEADERS
from mlx_dora.kernels.plans import KERNELS
from tests.metal_host.host import Host
from tests.metal_host.sweep import edits, judge

# Changes that no case can show, by a text of their label, and why.
HARMLESS = {
    r"wide.h.*bound shifted: if \((is_wide && )?live >= uint\(N\)\)": (
        "a full step takes the path of the tail, with the same result"
    ),
    r"common.h.*bound shifted: for \(uint at = lid; at <": (
        "the turn past the end writes the tile's padding, which nothing reads"
    ),
    r"adapted_norm.*bound shifted: for \(int k0 = 0; k0 < R;": (
        "the turn past the end loads nothing and adds nothing"
    ),
    r"adapted_norm.*bound shifted: if \(R > 4 \* QUADS\) \{": (
        "one more barrier, which all threads reach"
    ),
    r"adapted_norm.metal.*bound shifted( back)?: constexpr int ROWS = R > 16": (
        "any number of rows is right, since the rounds cover them; it sets the speed"
    ),
    r"(normalize_rows|fused_weight).*bound shifted: for \(uint c = lid": (
        "the turn past the last column reads zeros and stores nothing"
    ),
}


def reason(label: str) -> str:
    """Why a survivor is harmless, or nothing."""
    return next((why for text, why in HARMLESS.items() if re.search(text, label)), "")


def sweep(host: Host, every_case, files: list[str]) -> tuple[int, int]:
    """How many changes of these files there are and how many were seen.

    Those that no compiler takes, or that leave the machine code as it was, are none.
    """
    verdicts: dict[str, str] = {}
    for file in files:
        verdicts |= judge(host, list(edits(file)), every_case)
    changes = {
        label: verdict
        for label, verdict in verdicts.items()
        if verdict != "same machine code" and not verdict.startswith("does not compile")
    }
    survivors = [label for label, verdict in changes.items() if not verdict]
    assert [label for label in survivors if not reason(label)] == []
    return len(changes), len(changes) - len(survivors)


@pytest.mark.slow
def test_sweep_of_one_kernel(host: Host, every_case):
    changes, caught = sweep(host, every_case, ["normalize_rows.metal"])
    assert changes >= 8
    assert caught >= changes - 2  # the two loops over columns, see HARMLESS


@pytest.mark.slow
def test_sweep_of_every_kernel(host: Host, every_case):
    files = [*HEADERS, *(f"{kernel}.metal" for kernel in KERNELS)]
    changes, caught = sweep(host, every_case, files)
    assert changes > 150
    assert caught / changes >= 0.95, f"{caught} of {changes} caught"
