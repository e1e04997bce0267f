"""Writes docs/models.md: ``python -m tests.compat.model_table docs/models.md``."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_dora import openblas

openblas.preload()

import mlx_lm  # noqa: E402 - OpenBLAS first

from tests.compat.put_through import Outcome, put_through  # noqa: E402
from tests.compat.tiny_models import model_names  # noqa: E402

_WORDS = {
    "fails": "Trained, but something is wrong",
    "refused": "Refused",
    "not built": "Not built here, so not tried",
}


def outcomes() -> list[Outcome]:
    """Every model of mlx-lm put through."""
    return [put_through(name) for name in model_names()]


def render(found: Sequence[Outcome]) -> str:
    """The page, without figures that rounding could change."""
    works = [one for one in found if one.state == "works"]
    counts = [
        f"{sum(one.state == state for one in found)} {words.lower()}"
        for state, words in _WORDS.items()
    ]
    lines = [
        "# Models",
        "",
        f"Of the {len(found)} model classes of mlx-lm {mlx_lm.__version__} that can be",
        f"imported, {len(works)} work; {', '.join(counts)}. Each is built",
        "tiny at random, adapted on every linear layer, embedding and expert of its",
        "blocks, trained for four steps, saved, loaded and fused, and the logits are",
        "compared at each turn (`tests/compat/put_through.py`).",
        "`python -m tests.compat.model_table docs/models.md` writes this page, and",
        "`pytest -m slow tests/compat` holds it to what happens.",
        "",
        "## Work",
        "",
        "With a star: experts are adapted too.",
        "",
        ", ".join(f"{one.name}{'*' * bool(one.experts)}" for one in works) + ".",
    ]
    for state, words in _WORDS.items():
        chosen = [one for one in found if one.state == state]
        if chosen:
            lines += ["", f"## {words}", "", "| model | why |", "| --- | --- |"]
            lines += [f"| {one.name} | {one.reason} |" for one in chosen]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    Path(sys.argv[1]).write_text(render(outcomes()), encoding="utf-8")
