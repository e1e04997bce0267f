"""Chooses how to merge adapters: tries candidates on rows of each task's data."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.merge.choice.candidates import Candidate
    from mlx_dora.merge.choice.choose import choose_merge
    from mlx_dora.merge.choice.result import MergeChoice

_HOME = {
    "Candidate": "mlx_dora.merge.choice.candidates",
    "MergeChoice": "mlx_dora.merge.choice.result",
    "choose_merge": "mlx_dora.merge.choice.choose",
}

__all__ = ["Candidate", "MergeChoice", "choose_merge"]

__getattr__, __dir__ = public_names(__name__, _HOME)
