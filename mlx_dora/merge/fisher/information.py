r"""Fisher information of a model's matrices, in memory or in a folder.

Each matrix has either one number per element, the diagonal
:math:`F_{jk} = E[(\partial \log p / \partial W'_{jk})^2]`, or one per output row,
:math:`f_j = \sum_k F_{jk}`. `mlx_dora.merge.fisher.estimate` computes it;
``docs/merging.md`` explains it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_dora.adapters.adapter import listed
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import atomic_directory, write_text
from mlx_dora.io.checkpoint import MAX_SHARD_BYTES, Checkpoint, ShardWriter
from mlx_dora.io.json import read_object
from mlx_dora.io.output import Inputs
from mlx_dora.merge.methods import method_named

FACTS_NAME = "fisher.json"


@dataclass(frozen=True, kw_only=True)
class FisherFacts:
    """Origin of Fisher information.

    Attributes:
        granularity: ``"row"`` or ``"element"``.
        labels: ``"sampled"`` or ``"data"``.
        rows: Number of data rows in the mean.
        tokens: Number of target tokens in them.
        norm: Square root of the sum of squares of all numbers.
        model: The model, as the user named it.
        adapter: The adapter, as the user named it.
        data: The data set, as the user named it.
    """

    granularity: str
    labels: str
    rows: int
    tokens: int
    norm: float
    model: str | None = None
    adapter: str | None = None
    data: str | None = None


class Fisher:
    """Fisher information by module path, read one matrix at a time.

    Args:
        facts: Origin of the information.
        tensors: Arrays of shape ``(out,)`` or ``(out, in)`` by module path; or the
            folder that holds them.
        name: Name for error messages.
    """

    def __init__(
        self,
        facts: FisherFacts,
        tensors: Mapping[str, mx.array] | Checkpoint,
        name: str = "the Fisher information",
    ) -> None:
        self.facts, self.name, self._tensors = facts, name, tensors
        names = tensors.names if isinstance(tensors, Checkpoint) else list(tensors)
        self.paths = frozenset(names)

    def read(self, path: str, shape: tuple[int, ...]) -> mx.array | None:
        """Read the information of one matrix, divided by `norm`; None if there is none.

        With this scaling the information of every input has norm 1, whatever its data
        and number of tokens, so that only the weights set how much each input counts
        (as in the authors' code). The weight has the shape ``(out, in)``.

        Raises:
            DoRAError: If it does not match the weight, is negative, or is not finite.
        """
        if path not in self.paths:
            return None
        tensors = self._tensors
        is_file = isinstance(tensors, Checkpoint)
        values = tensors.tensor(path) if is_file else tensors[path]
        wanted = shape if self.facts.granularity == "element" else shape[:1]
        if values.shape != wanted:
            raise DoRAError(
                f"{self.name}: {path} has shape {values.shape}; the weight needs "
                f"{wanted}."
            )
        values = values.astype(mx.float32) / self.facts.norm
        if not (mx.isfinite(values) & (values >= 0)).all():
            raise DoRAError(f"{self.name}: {path} holds NaN, inf or negative numbers.")
        return values


def save_fisher(
    path: str | Path,
    facts: FisherFacts,
    tensors: Iterable[tuple[str, mx.array]],
    *,
    inputs: Inputs = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> FisherFacts:
    """Write Fisher information: safetensors, and ``fisher.json`` with the facts.

    `tensors` are pairs of module path and array, read one at a time. Files and folders
    in `inputs` are never replaced.

    Returns:
        The facts, with the norm of the tensors.

    Raises:
        DoRAError: If the folder exists, or all numbers are 0.
    """
    square = 0.0
    with atomic_directory(path, inputs=inputs, overwrite=overwrite) as out:
        with ShardWriter(out, max_shard_bytes=max_shard_bytes) as writer:
            for name, tensor in tensors:
                square += squared(tensor)
                writer.add(name, tensor)
        facts = with_norm(facts, square)
        write_text(out / FACTS_NAME, json.dumps(asdict(facts), indent=2) + "\n")
    return facts


def load_fisher(path: str | Path) -> Fisher:
    """Open a folder that `save_fisher` wrote, without reading tensors.

    Raises:
        DoRAError: If it is not a folder of Fisher information, or a file is broken.
    """
    facts = Path(path) / FACTS_NAME
    if not facts.is_file():
        raise DoRAError(
            f"{path} has no {FACTS_NAME}: make the folder with `mlx_dora.merge fisher`."
        )
    checkpoint = Checkpoint(path, all_weights=True)
    return Fisher(_facts_of(read_object(facts), facts), checkpoint, str(path))


def _facts_of(content: Mapping[str, Any], path: Path) -> FisherFacts:
    """Check the type and range of each fact in a file."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    def is_name(value: Any) -> bool:
        return isinstance(value, str | None)

    checks: dict[str, Callable[[Any], bool]] = {
        "granularity": lambda value: value in ("row", "element"),
        "labels": lambda value: value in ("sampled", "data"),
        "rows": is_count,
        "tokens": is_count,
        "norm": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
        **dict.fromkeys(("model", "adapter", "data"), is_name),
    }
    given = [name for name in checks if name in content]
    bad = [f"{n} is {content[n]!r:.60}" for n in given if not checks[n](content[n])]
    needed = [name for name, check in checks.items() if check is not is_name]
    bad += [f"{name} is missing" for name in needed if name not in content]
    bad += [f"{name} is unknown" for name in content if name not in checks]
    if bad:
        raise DoRAError(
            f"{path} is damaged or was edited: {'; '.join(bad)}. Estimate it again."
        )
    return FisherFacts(**content)


def squared(tensor: mx.array) -> float:
    """Sum of squares, without float32 overflow for large information."""
    largest = float(mx.abs(tensor).max())
    if not largest:
        return 0.0
    return float(mx.square(tensor / largest).sum()) * largest**2


def with_norm(facts: FisherFacts, square: float) -> FisherFacts:
    """The facts with `norm` set to the root of a sum of squares.

    Raises:
        DoRAError: If it is 0: the data gives no information about the matrices.
    """
    if not square > 0:
        raise DoRAError(
            f"{facts.data or 'the data'} gives no information about these matrices: "
            "the gradients of its targets are 0."
        )
    return replace(facts, norm=square**0.5)


def check_fishers(
    method: str, given: Sequence[Fisher | str | Path] | None, count: int
) -> list[Fisher]:
    """Open the Fisher information of a merge, if its method needs it.

    Raises:
        DoRAError: If the number of estimates is not `count`, their granularities
            differ, or the method does not use them.
    """
    if not method_named(method).needs_fisher:
        if given is not None:
            raise DoRAError(
                f"{method} does not use Fisher information: choose method fisher, or "
                "give none."
            )
        return []
    if given is None or len(given) != count:
        raise DoRAError(
            f"{method} needs {count} estimates of the Fisher information, one for each "
            f"input, got {0 if given is None else len(given)}."
        )
    opened = [item if isinstance(item, Fisher) else load_fisher(item) for item in given]
    kinds = sorted({fisher.facts.granularity for fisher in opened})
    if len(kinds) > 1:
        raise DoRAError(
            "Fisher information of all inputs must have the same granularity, got "
            f"{' and '.join(kinds)}."
        )
    return opened


def check_paths(fishers: Sequence[Fisher], known: Iterable[str]) -> None:
    """Refuse information of modules that the model does not have.

    Raises:
        DoRAError: Naming them.
    """
    modules = frozenset(known)
    for fisher in fishers:
        strange = listed(
            "no such modules in the model:", sorted(fisher.paths - modules)
        )
        if strange:
            raise DoRAError(f"{fisher.name} does not fit the model: {strange[0]}.")


def informed_weights(
    weights: np.ndarray, informations: Sequence[mx.array | None]
) -> tuple[np.ndarray, int]:
    """Multiply weights ``(rows, N)`` by information ``(rows,)``; normalize to sum 1.

    If any information is None, none is used.

    Returns:
        The weights, and the number of rows without information, which keep theirs.
    """
    if any(information is None for information in informations):
        return weights, len(weights)
    known = np.stack(
        [np.array(information, np.float64) for information in informations], axis=1
    )
    informed = weights * known
    total = informed.sum(1, keepdims=True)
    is_known = total > 0
    shares = np.where(is_known, informed / np.where(is_known, total, 1.0), weights)
    return shares, int((~is_known).sum())
