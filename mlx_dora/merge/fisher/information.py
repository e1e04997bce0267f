r"""Fisher information of a model's matrices: in memory or in a folder, and its use.

For each matrix either one number an element, the diagonal
:math:`F_{jk} = E[(\partial \log p / \partial W'_{jk})^2]`, or one an output row,
:math:`f_j = \sum_k F_{jk}`. `mlx_dora.merge.fisher.estimate` makes it;
``docs/merging.md`` says what it means.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """Where Fisher information is from.

    Attributes:
        granularity: ``"row"`` or ``"element"``.
        labels: ``"sampled"`` or ``"data"``.
        rows: Rows of the data that it is the mean over.
        tokens: Target tokens in them.
        norm: Root of the sum of squares of all numbers.
        model: The model, as the user wrote it.
        adapter: The adapter on it.
        data: The data.
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
        facts: Where it is from.
        tensors: Path to ``(out,)`` or ``(out, in)``; or the folder that holds them.
        name: What an error calls it.
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
        """The information of one matrix over `norm`; None if there is none of it.

        So scaled, the information of each input is 1 long in all, whatever its data
        and their number of tokens, and the weights alone say how much it counts (as in
        the authors' code).

        Args:
            path: The module.
            shape: Of its weight, ``(out, in)``.

        Raises:
            DoRAError: If it does not fit the weight, is negative, or not finite.
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
            raise DoRAError(f"{self.name}: {path} holds NaN, inf or less than 0.")
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
    """Write a folder: safetensors, and ``fisher.json`` with the facts.

    Args:
        path: The folder to make.
        facts: Where it is from; the norm is taken from the tensors.
        tensors: Module path to array; taken one at a time.
        inputs: All that was read to make it, which is never replaced.
        overwrite: Replace an existing folder.
        max_shard_bytes: A shard is closed before it would grow past this.

    Returns:
        The facts with the norm.

    Raises:
        DoRAError: If the folder exists, or there is no information at all.
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
    """Open a folder that `save_fisher` wrote; no tensor is read yet.

    Raises:
        DoRAError: If it is no such folder, or a file of it is broken.
    """
    facts = Path(path) / FACTS_NAME
    if not facts.is_file():
        raise DoRAError(
            f"{path} has no {FACTS_NAME}: `mlx_dora.merge fisher` makes it."
        )
    checkpoint = Checkpoint(path, all_weights=True)
    return Fisher(_facts_of(read_object(facts), facts), checkpoint, str(path))


def _facts_of(content: Mapping[str, Any], path: Path) -> FisherFacts:
    """The facts that a file holds, each of its type and in its range."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 0

    checks: dict[str, Callable[[Any], bool]] = {
        "granularity": lambda value: value in ("row", "element"),
        "labels": lambda value: value in ("sampled", "data"),
        "rows": is_count,
        "tokens": is_count,
        "norm": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
    }
    names = dict.fromkeys(("model", "adapter", "data"), None)
    lacking = [name for name in checks if name not in content]
    unknown = [name for name in content if name not in {**checks, **names}]
    bad = [
        f"{name} is {content[name]!r:.60}"
        for name in {**checks, **names}
        if name in content
        and not checks.get(name, lambda value: isinstance(value, str | None))(
            content[name]
        )
    ]
    bad += [f"{name} is missing" for name in lacking]
    bad += [f"{name} is unknown" for name in unknown]
    if bad:
        raise DoRAError(f"{path} is not what was written there: {'; '.join(bad)}.")
    return FisherFacts(**content)


def squared(tensor: mx.array) -> float:
    """Sum of squares, which in float32 would overflow for large information."""
    largest = float(mx.abs(tensor).max())
    if not largest:
        return 0.0
    return float(mx.square(tensor / largest).sum()) * largest**2


def with_norm(facts: FisherFacts, square: float) -> FisherFacts:
    """The facts with the root of a sum of squares.

    Raises:
        DoRAError: If it is 0: no row tells anything of the matrices.
    """
    if not square > 0:
        raise DoRAError(
            f"{facts.data or 'the data'} tells nothing of these matrices: the "
            "gradients of its targets are 0."
        )
    return FisherFacts(**{**asdict(facts), "norm": square**0.5})


def check_fishers(
    method: str, given: Sequence[Fisher | str | Path] | None, count: int
) -> list[Fisher]:
    """Open the Fisher information of a merge by a method that needs it.

    Raises:
        DoRAError: If it is not one for each of `count` inputs, or they are of unlike
            granularity.
    """
    if not method_named(method).needs_fisher:
        if given is not None:
            raise DoRAError(f"{method} has no use for Fisher information.")
        return []
    if given is None or len(given) != count:
        raise DoRAError(
            f"{method} needs {count} estimates of the Fisher information, one for each "
            f"input, got {0 if given is None else len(given)}."
        )
    opened = [item if isinstance(item, Fisher) else load_fisher(item) for item in given]
    kinds = sorted({fisher.facts.granularity for fisher in opened})
    if len(kinds) > 1:
        raise DoRAError(f"Fisher information must be alike, got {' and '.join(kinds)}.")
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
    """Weights of each row times its information, made to sum to 1.

    Args:
        weights: Shape ``(rows, N)``; each row sums to 1.
        informations: N of shape ``(rows,)``; a None makes all count as none.

    Returns:
        Shape ``(rows, N)``, and the number of rows nobody knows anything of, which keep
        `weights`.
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
