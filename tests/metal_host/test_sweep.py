"""The generic sweep: every change is seen, but for those that do nothing.

Each of these is declared with its reason; they are at most 6 % of all.
"""

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
    r"adapted_norm.*bound shifted: if \(R > 4 \* QUADS\) \{": (
        "one more barrier, which all threads reach"
    ),
    r"adapted_norm.metal.*bound shifted back: constexpr bool IS_TALL = R > 16": (
        "at rank 17 the launch has twice the strips that wide strips need; the rest of "
        "them are empty"
    ),
    r"adapted_norm_packed.*:44: bound shifted back: const bool is_inside = row < out": (
        "c and n are multiples of 8"
    ),
    r"(normalize_rows|fused_weight).*bound shifted: for \(uint c = lid": (
        "the turn past the last column reads zeros and stores nothing"
    ),
}


EVERY_FILE = [*HEADERS, *(f"{kernel}.metal" for kernel in KERNELS)]


def of(text: str, labels: list[str]) -> list[str]:
    """The labels that a text of `HARMLESS` is about."""
    return [label for label in labels if re.search(text, label)]


def reason(label: str) -> str:
    """Why a survivor is harmless, or nothing."""
    return next((why for text, why in HARMLESS.items() if of(text, [label])), "")


def sweep(host: Host, every_case, files: list[str]) -> tuple[int, list[str]]:
    """How many changes of these files there are and which were not seen.

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
    return len(changes), survivors


@pytest.mark.slow
def test_sweep_of_one_kernel(host: Host, every_case):
    changes, survivors = sweep(host, every_case, ["normalize_rows.metal"])
    assert changes >= 8
    assert len(survivors) <= 2  # the two loops over columns, see HARMLESS


@pytest.mark.slow
def test_sweep_of_every_kernel(host: Host, every_case):
    changes, survivors = sweep(host, every_case, EVERY_FILE)
    assert changes > 150
    assert len(survivors) / changes <= 0.06, survivors
    assert [text for text in HARMLESS if not of(text, survivors)] == []


def test_every_reason_is_for_a_change_that_the_rules_make():
    labels = [edit.label for file in EVERY_FILE for edit in edits(file)]
    assert len(set(labels)) == len(labels)
    assert [text for text in HARMLESS if not of(text, labels)] == []
