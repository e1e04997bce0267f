"""Writes docs/models.md: ``python -m tests.compat.model_table docs/models.md``."""

import contextlib
import io
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_dora import openblas

openblas.preload()

import mlx_lm  # noqa: E402 - OpenBLAS first

from tests.compat.causes import CAUSES, CAUSES_PACKED  # noqa: E402
from tests.compat.put_through import Outcome, put_through  # noqa: E402
from tests.compat.tiny_models import model_files  # noqa: E402

BITS = 4
# State: what the counts call it, its heading, and the heading of its second column.
_STATES = {
    "works": ("work", "What works", ""),
    "in part": (
        "work but for modules refused by name",
        "Works but for some modules",
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
{parts} parts that they share. Each class is built tiny at random, adapted on all in its
blocks that can take DoRA, trained for four steps, saved, loaded and fused. Each time
its logits are compared, of a prompt and of a token decoded after it from the cache.
Then all of it once more, packed into {bits} bits.
"""
_INDEXERS = """\
Adapted by default, but of no use: the indexers of sparse attention, which no gradient
reaches ({idle}). Leave them out by giving keys.
"""
_MAKING = """\
`python -m tests.compat.model_table docs/models.md` writes it on Linux without a GPU,
and `pytest -m slow tests/compat/test_models.py` holds it to what happens. The tiny
arguments are in `tests/compat/tiny_sizes.py`, the steps in
`tests/compat/put_through.py`, the causes in `tests/compat/causes.py`. Parameters that
a class leaves at zero are made random, since zeros hide what they are multiplied
with. olmo's file asks for the package ai2-olmo and uses nothing of it: an empty one
was given.
"""


def outcomes(bits: int | None = None) -> list[Outcome]:
    """Every model of mlx-lm put through."""
    names = [name for name, is_model in model_files().items() if is_model]
    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints when it packs
        return [put_through(name, bits) for name in names]


def render(dense: Sequence[Outcome], packed: Sequence[Outcome]) -> str:
    """The page, without figures that rounding could change."""
    parts = [name for name, is_model in model_files().items() if not is_model]
    introduction = _INTRODUCTION.format(
        version=mlx_lm.__version__,
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
        chosen = [one for one in dense if one.state == state]
        if state == "works":
            lines += [f"## {title}", "", *_lists(chosen)]
        else:
            lines += _table(title, column, chosen, CAUSES)
    both = zip(packed, dense, strict=True)
    changed = [one for one, other in both if one.state != other.state]
    title = f"Different in {BITS} bits"
    lines += _table(title, "what happens", changed, CAUSES | CAUSES_PACKED)
    lines += ["## Parts that models share", "", *_wrapped(f"{', '.join(parts)}."), ""]
    lines += ["## How this page is made", "", *_wrapped(_MAKING)]
    return "\n".join(lines) + "\n"


def _lists(works: Sequence[Outcome]) -> list[str]:
    experts = [one for one in works if "SwitchLinear" in one.bases]
    heads = [one for one in works if "MultiLinear" in one.bases]
    lists = {
        "Without experts": [one for one in works if one not in experts],
        "With experts, which are adapted too": experts,
        "Where latent attention's matrices by head are adapted too, by keys": heads,
    }
    lines = []
    for title, chosen in lists.items():
        if chosen:
            names = ", ".join(one.name for one in chosen)
            lines += [*_wrapped(f"**{title}** ({len(chosen)}): {names}."), ""]
    idle: dict[tuple[str, ...], list[str]] = {}
    for one in works:
        if one.idle:
            idle.setdefault(one.idle, []).append(one.name)
    if idle:
        told = [
            f"{' and '.join(names)}: {', '.join(f'`{path}`' for path in paths)}"
            for paths, names in idle.items()
        ]
        lines += [*_wrapped(_INDEXERS.format(idle="; ".join(told))), ""]
    return lines


def _table(
    title: str,
    told: str,
    chosen: Sequence[Outcome],
    causes: Mapping[str, tuple[str, str]],
) -> list[str]:
    if not chosen:
        return []
    return [
        f"## {title}",
        "",
        f"| model | {told} | mlx-lm's own LoRA | fault of | why |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one.name} | {one.reason} "
            f"| {'trains' if one.lora == 'trains' else 'fails too'} "
            f"| {' | '.join(causes.get(one.name, _UNKNOWN))} |"
            for one in chosen
        ),
        "",
    ]


def _count(found: Sequence[Outcome], state: str) -> int:
    return sum(one.state == state for one in found)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    page = render(outcomes(), outcomes(BITS))
    Path(sys.argv[1]).write_text(page, encoding="utf-8")
