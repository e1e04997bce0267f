"""The generic sweep: at least 95 % of the changes are seen; the rest change nothing."""

import re

import pytest

from mlx_dora.kernels._table import KERNELS
from tests.metal_host.host import Host
from tests.metal_host.sweep import COMMON, edits, judge

# Changes that no case can show, by a text of their label, and why.
HARMLESS = {
    r"common.h.*bound shifted: if \(live >= uint\(N\)\)": (
        "a full step takes the path of the tail, with the same result"
    ),
    r"common.h.*bound shifted: for \(int i = 0; i < N; \+\+i\)": (
        "the turn past the end is stopped by the bound inside"
    ),
    r"common.h.*bound shifted: return c < n \? n - c : 0u": "n - c is 0 there",
    r"common.h.*bound shifted: for \(int k0 = 0; k0 < R;": (
        "the turn past the end loads nothing and adds nothing"
    ),
    r"common.h.*bound shifted( back)?: } else if \(BITS > 4\)": (
        "4 bits by the path of 5 bits and more, with the same result"
    ),
    r"adapted_norm.*bound shifted: for \(uint c0 = 0; c0 < n;": (
        "the turn past the last column adds zeros"
    ),
    r"bound shifted back: const uint steps = STEPS > 0": (
        "one step, given or computed, is the same"
    ),
    r"packed.*const bool is_second": "loads words of the next run, which nobody uses",
}


def reason(label: str) -> str:
    """Why a survivor is harmless, or nothing."""
    return next((why for text, why in HARMLESS.items() if re.search(text, label)), "")


def sweep(host: Host, every_case, files: list[str]) -> list[str]:
    """The verdicts on every change of these files that is one, survivors explained."""
    verdicts = {}
    for file in files:
        verdicts |= judge(host, list(edits(file)), every_case)
    changes = {
        label: verdict
        for label, verdict in verdicts.items()
        if verdict != "same machine code" and not verdict.startswith("does not compile")
    }
    survivors = [label for label, verdict in changes.items() if not verdict]
    unexplained = [label for label in survivors if not reason(label)]
    assert unexplained == []
    caught = 1 - len(survivors) / len(changes)
    assert caught >= 0.95, f"{caught:.1%} caught; survivors: {survivors}"
    return list(changes)


def test_sweep_of_one_kernel(host: Host, every_case):
    assert len(sweep(host, every_case, ["normalize_rows.metal"])) >= 10


@pytest.mark.slow
def test_sweep_of_every_kernel(host: Host, every_case):
    files = [COMMON, *(f"{kernel}.metal" for kernel in KERNELS)]
    assert len(sweep(host, every_case, files)) >= 150
