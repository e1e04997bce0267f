"""The reference's log-probabilities of all examples, computed once and kept in a file.

The file names the data, the base model and the reference that it was made for.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.data.batches import Examples, pad_batch
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.evaluate.loss import eval_mode
from mlx_dora.io.atomic import write_tensors
from mlx_dora.io.gate import read_tensors
from mlx_dora.io.header import read_header_and_metadata
from mlx_dora.train.group import share, share_tensors, together
from mlx_dora.train.objectives.objective import Surroundings
from mlx_dora.train.objectives.reference import Reference

FILE_NAME = "reference.safetensors"


@dataclass(frozen=True, kw_only=True)
class ReferenceTable:
    """Log-probabilities of the examples of some data sets under the reference.

    Args:
        sets: The data sets, and the log-probability of each example, float32.
    """

    sets: Sequence[tuple[Examples, mx.array]]

    @classmethod
    def made(cls, around: Surroundings, reference: Reference) -> Self:
        """Read the table from the adapter's folder, or compute and write it.

        Raises:
            DoRAError: If the file there was made for other data, another base model or
                another reference, and `overwrite` is not set.
        """
        group, folder, train = around.group, around.folder, around.train
        sets = {"train": around.train_set, "valid": around.valid_set}
        present = {name: data for name, data in sets.items() if data is not None}
        key = {
            **{f"{name} data": _digest(data) for name, data in present.items()},
            "base model": around.base,
            "reference": reference.identity,
            "max_seq_length": train.max_seq_length,
        }
        path = folder / FILE_NAME
        with together(group):
            stored = None
            if group.rank() == 0 and path.exists():
                stored = _read(path, key, replace=train.overwrite)
        if share(stored is not None, group):
            empty = {name: mx.zeros(len(data)) for name, data in present.items()}
            tensors = share_tensors(stored or empty, group)
        else:
            tensors = {
                name: _compute(around, reference, data)
                for name, data in present.items()
            }
            with together(group):
                if group.rank() == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_tensors(path, tensors, {"made for": json.dumps(key)})
        return cls(sets=[(data, tensors[name]) for name, data in present.items()])

    def has(self, data: Examples) -> bool:
        """Whether the table holds a data set."""
        return any(known is data for known, _ in self.sets)

    def look_up(self, data: Examples, indices: mx.array) -> mx.array:
        """The log-probabilities of some examples; 0 where the index is -1."""
        values = next(values for known, values in self.sets if known is data)
        return mx.where(indices >= 0, values[mx.maximum(indices, 0)], 0.0)


def _read(path: Path, key: dict[str, object], *, replace: bool) -> dict | None:
    """The tensors of a table made for `key`; None if it is to be replaced."""
    _, metadata = read_header_and_metadata(path)
    try:
        made_for = json.loads(metadata.get("made for", "{}"))
    except ValueError:
        made_for = {}
    differ = [
        name
        for name in sorted({*key, *made_for})
        if key.get(name) != made_for.get(name)
    ]
    if not differ:
        return read_tensors(path)
    if replace:
        return None
    raise DoRAError(
        f"{path} was made for another training ({', '.join(differ)} differ): delete "
        "it, choose another adapter_path, or set overwrite (--overwrite) to replace it."
    )


def _compute(around: Surroundings, reference: Reference, data: Examples) -> mx.array:
    """Compute the log-probabilities of all examples, shared among the processes."""
    group, most = around.group, around.train.max_seq_length
    values = np.zeros(len(data), np.float32)
    batches = list(_batches(data, around.train.batch_size * 2, most))
    with eval_mode(around.model), reference.standing_in(around.model):
        for number, (places, examples) in enumerate(batches):
            if number % group.size() == group.rank():
                tokens, marks = pad_batch(examples, most)
                values[places] = np.array(_totals(around.model, tokens, marks))
            if around.progress is not None:
                around.progress("reference", len(data), len(places))
    total = mx.array(values)
    if group.size() > 1:
        total = mx.distributed.all_sum(total, group=group)
    mx.eval(total)
    return total


def _totals(model: nn.Module, tokens: mx.array, marks: mx.array) -> mx.array:
    return row_log_probs(model, tokens, marks, gradient=False).total


def _batches(
    data: Examples, rows: int, most: int
) -> Iterator[tuple[list[int], list[Example]]]:
    """Examples of similar length and their places."""
    lengths = [min(len(data[index][0]), most) for index in range(len(data))]
    order = sorted(range(len(data)), key=lengths.__getitem__)
    for at in range(0, len(order), rows):
        places = order[at : at + rows]
        yield places, [data[index] for index in places]


def _digest(data: Examples) -> str:
    """Hash the tokens and targets of all examples, in order."""
    total = hashlib.sha256()
    for index in range(len(data)):
        tokens, targets = data[index]
        total.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        total.update(json.dumps(targets).encode())
    return f"sha256:{total.hexdigest()}"
