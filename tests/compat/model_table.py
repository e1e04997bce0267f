"""Writes docs/models.md: ``python -m tests.compat.model_table docs/models.md``."""

import contextlib
import io
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from mlx_dora import openblas
from mlx_dora.train.metal import WITHOUT_GRADIENT
from tests.compat.causes import CAUSES, CAUSES_PACKED, GATED_DELTA
from tests.compat.put_through import Outcome, put_through
from tests.compat.tiny_models import model_files

openblas.preload()  # importing mlx_dora has done it, before MLX was imported

BITS = 4
# State: its name in the table of counts, its heading, and that of its second column.
_STATES = {
    "works": ("work", "What works", ""),
    "in part": (
        "work except for modules refused by name",
        "Works except for some modules",
        "refused",
    ),
    "refused": ("refused by name", "Refused by name", "refused"),
    "broken": (
        "stopped by mlx-lm's own code",
        "Stopped by mlx-lm's own code",
        "what happens",
    ),
    "fails": ("wrong here", "Wrong here", "what happens"),
}
_UNKNOWN = ("?", "Not known.")
_INTRODUCTION = """\
mlx-lm {version} has {files} files in `mlx_lm/models`: {classes} model classes and
{parts} parts that they share. A test builds each class as a tiny random model, adapts
every module in its blocks that can take DoRA, trains it for four steps, and saves,
loads and fuses the result. After each of these, it compares the logits of a prompt and
of a token decoded after the prompt from the cache. Then it repeats everything with the
model packed into {bits} bits [F5](figures.md#f5).
"""
_INDEXERS = """\
Adapted by default, but without effect: the indexers of sparse attention, which no
gradient reaches ({idle}). To leave them out, set `keys`.
"""
_ON_METAL = """\
No model of this page was run on an Apple GPU. `tests/compat/gpu_branches.py` runs
mlx-lm's code on Linux with the branches that only a GPU takes, and notes which kernels
the backward pass needs the gradient of. These models call a Metal kernel that has none;
training them on an Apple GPU is refused by name, in one line. Their inference is not
affected.
"""
_DELTA = """\
Gated delta nets train token by token in mlx-lm. Where MLX has kernels with a gradient
for their shape (the names in the installed library say which: in 0.32.4, keys and
values of width 128 in 16, 24 or 32 heads), mlx_dora trains them through
`mx.fast.gated_delta_update`, after comparing values and gradients with mlx-lm's
operations at the first use. This serves the nets whose state decays by one number per
head ({head}). The others decay by one for each number of a key ({key}) and stay with
mlx-lm's operations.
"""
_MAKING = """\
`python -m tests.compat.model_table docs/models.md` writes this page on Linux without a
GPU, and `pytest -m slow tests/compat/test_models.py` checks that the page is current.
The sizes of the tiny models are in `tests/compat/tiny_sizes.py`, the steps in
`tests/compat/put_through.py`, and the causes in `tests/compat/causes.py`. Parameters
that a class initializes to zero are set to random numbers, since a zero would hide
whatever it is multiplied with. olmo's file imports the package ai2-olmo but uses
nothing of it, so the test provides an empty package.
"""


def outcomes(bits: int | None = None) -> list[Outcome]:
    """Test every model of mlx-lm."""
    names = [name for name, is_model in model_files().items() if is_model]
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints when it packs
        return [put_through(name, bits) for name in names]


def render(dense: Sequence[Outcome], packed: Sequence[Outcome]) -> str:
    """Render the page, without figures that rounding could change."""
    parts = [name for name, is_model in model_files().items() if not is_model]
    introduction = _INTRODUCTION.format(
        version=version("mlx-lm"),
        files=len(dense) + len(parts),
        classes=len(dense),
        parts=len(parts),
        bits=BITS,
    )
    counts = [
        f"| {words} | {_count(dense, state)} | {_count(packed, state)} |"
        for state, (words, _, _) in _STATES.items()
    ]
    lines = ["# Models", "", *_wrapped(introduction), ""]
    lines += [
        f"| classes of models | dense | {BITS} bits |",
        "| --- | ---: | ---: |",
        *counts,
        "",
    ]
    for state, (_, title, column) in _STATES.items():
        chosen = [outcome for outcome in dense if outcome.state == state]
        if state == "works":
            lines += [f"## {title}", "", *_lists(chosen)]
        else:
            lines += _table(title, column, chosen, CAUSES)
    both = zip(packed, dense, strict=True)
    changed = [outcome for outcome, other in both if outcome.state != other.state]
    title = f"Different in {BITS} bits"
    lines += _table(title, "what happens", changed, CAUSES | CAUSES_PACKED)
    lines += _on_metal()
    lines += ["## Parts that models share", "", *_wrapped(f"{', '.join(parts)}."), ""]
    lines += ["## How this page is made", "", *_wrapped(_MAKING)]
    return "\n".join(lines) + "\n"


def _lists(works: Sequence[Outcome]) -> list[str]:
    experts = [outcome for outcome in works if "SwitchLinear" in outcome.bases]
    heads = [outcome for outcome in works if "MultiLinear" in outcome.bases]
    lists = {
        "Without experts": [outcome for outcome in works if outcome not in experts],
        "With experts, which are adapted too": experts,
        "With heads of latent attention, adapted if `keys` names them": heads,
    }
    lines = []
    for title, chosen in lists.items():
        if chosen:
            names = ", ".join(outcome.name for outcome in chosen)
            lines += [*_wrapped(f"**{title}** ({len(chosen)}): {names}."), ""]
    idle: dict[tuple[str, ...], list[str]] = {}
    for outcome in works:
        if outcome.idle:
            idle.setdefault(outcome.idle, []).append(outcome.name)
    if idle:
        groups = [
            f"{' and '.join(names)}: {', '.join(f'`{path}`' for path in paths)}"
            for paths, names in idle.items()
        ]
        lines += [*_wrapped(_INDEXERS.format(idle="; ".join(groups))), ""]
    return lines


def _table(
    title: str,
    column: str,
    chosen: Sequence[Outcome],
    causes: Mapping[str, tuple[str, str]],
) -> list[str]:
    if not chosen:
        return []
    return [
        f"## {title}",
        "",
        f"| model | {column} | mlx-lm's own LoRA | fault of | why |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {outcome.name} | {outcome.reason} "
            f"| {'trains' if outcome.lora == 'trains' else 'fails too'} "
            f"| {' | '.join(causes.get(outcome.name, _UNKNOWN))} |"
            for outcome in chosen
        ),
        "",
    ]


def _on_metal() -> list[str]:
    rows = [f"| {name} | {kernel} |" for name, kernel in WITHOUT_GRADIENT.items()]
    names = {decay: ", ".join(models) for decay, models in GATED_DELTA.items()}
    return [
        *("## On an Apple GPU", "", *_wrapped(_ON_METAL), ""),
        *("| model | Metal kernel without a gradient |", "| --- | --- |", *rows, ""),
        *(*_wrapped(_DELTA.format(**names)), ""),
    ]


def _count(group: Sequence[Outcome], state: str) -> int:
    return sum(outcome.state == state for outcome in group)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    page = render(outcomes(), outcomes(BITS))
    Path(sys.argv[1]).write_text(page, encoding="utf-8")
