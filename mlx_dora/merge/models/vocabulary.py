"""Unites the vocabularies of the models: the output's tokens, and their embeddings.

The rules are mergekit's. The output's tokenizer is that of the base (or the first
model), of a named model, or the union: the base's, with the other models' tokens added
behind it. Where a model lacks a token, its embedding is that of the only model which
has it, else of the base, else the mean of those that have it; rules for single tokens
come first. Then the embeddings are merged like any other tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.io.gathered import GatheredTensor
from mlx_dora.merge.methods.blockwise import Tensor, slices
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.tokenizer_file import TokenizerFile, added_entry
from mlx_dora.merge.models.tokenizer_plan import TokenizerPlan, TokenRule

Tensors = Mapping[ModelTensors, Tensor]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The output's vocabulary.

    Attributes:
        tokenizer: The tokenizer file that the output starts from.
        tokens: Ids of the output's tokens.
        added: Entries of the tokens that are added to the file.
        size: Number of rows of the embeddings.
        rows: For each model's folder, the row of each output token; −1 if it lacks it.
        own: Ids of each folder's own tokens.
        rules: Rules for single tokens, by id.
        models: All models by name.
        base: The base, or the first model.
    """

    tokenizer: TokenizerFile
    tokens: Mapping[str, int]
    added: Sequence[Mapping[str, object]]
    size: int
    rows: Mapping[Path, np.ndarray]
    own: Mapping[Path, Mapping[str, int]]
    rules: Mapping[int, TokenRule]
    models: Mapping[str, ModelTensors]
    base: ModelTensors

    def gathered(self, opened: Tensors) -> dict[ModelTensors, Tensor]:
        """Give the embeddings of all models of a merge the output's rows.

        Raises:
            DoRAError: If a rule names a row that no embedding has.
        """
        named = np.array(sorted(set(self.tokens.values())))
        rows = {}
        for model, tensor in opened.items():
            own = self.rows[model.folder].copy()
            own[own >= tensor.shape[0]] = -1
            rows[model] = own
        table = np.stack(list(rows.values()))
        forced = [i for i, rule in self.rules.items() if rule.force]
        lacking = set(named[(table[:, named] < 0).any(0)].tolist()) | set(forced)
        ids = sorted(lacking)
        width = int(np.prod(next(iter(opened.values())).shape[1:], dtype=int))
        extra = np.zeros((len(ids) + 1, width), np.float32)
        for j, token in enumerate(ids):
            extra[j] = self._default(token, rows, opened, extra.shape[1])
        gathered: dict[ModelTensors, Tensor] = {}
        for model, tensor in opened.items():
            own = np.full(self.size, -1 - len(ids), np.int64)  # rows without a token
            own[named] = rows[model][named]
            places = {token: -1 - j for j, token in enumerate(ids)}
            for token in ids:
                if own[token] < 0 or token in forced:
                    own[token] = places[token]
            mine = extra.copy()
            if self.size > len(named):
                mine[-1] = _mean(GatheredTensor(tensor, own[named], mine))
            gathered[model] = GatheredTensor(tensor, own, mine)
        return gathered

    def _default(
        self,
        token: int,
        rows: Mapping[ModelTensors, np.ndarray],
        opened: Tensors,
        width: int,
    ) -> np.ndarray:
        """The embedding of a token in models that lack it."""
        rule = self.rules.get(token)
        if rule is not None:
            if rule.kind == "zero":
                return np.zeros(width, np.float32)
            return self._ruled(token, rule, rows, opened)
        having = [model for model, own in rows.items() if own[token] >= 0]
        if len(having) > 1 and self.base in having:
            having = [self.base]
        if not having:
            return np.zeros(width, np.float32)
        values = [_row(opened[model], rows[model][token]) for model in having]
        return np.asarray(np.mean(values, axis=0, dtype=np.float64), np.float32)

    def _ruled(
        self,
        token: int,
        rule: TokenRule,
        rows: Mapping[ModelTensors, np.ndarray],
        opened: Tensors,
    ) -> np.ndarray:
        text = next(name for name, i in self.tokens.items() if i == token)
        where = f"tokenizer: tokens: {text}"
        model = self.models.get(str(rule.model))
        if model is None or model not in opened:
            raise DoRAError(f"{where}: {rule.model} is not among the merged models.")
        tensor = opened[model]
        if rule.kind == "model":
            row = int(rows[model][token])
        elif isinstance(rule.token, str):
            row = self.own[model.folder].get(rule.token, -1)
        else:
            row = -1 if rule.token is None else rule.token
        if not 0 <= row < tensor.shape[0]:
            what = text if rule.kind == "model" else rule.token
            raise DoRAError(f"{where}: {rule.model} has no token {what!r}.")
        return _row(tensor, row)


def _row(tensor: Tensor, row: int) -> np.ndarray:
    return np.array(tensor[int(row) : int(row) + 1].astype(mx.float32)).reshape(-1)


def _mean(tensor: GatheredTensor) -> np.ndarray:
    """Mean of all rows, read block by block."""
    total = np.zeros(tensor.size // max(tensor.shape[0], 1))
    step = max(1, (1 << 19) // max(len(total), 1))
    rows = tensor.reshape((tensor.shape[0], -1))
    for index in slices(tensor.shape[0], step):
        total += np.array(rows[index]).sum(0, dtype=np.float64)
    return (total / max(tensor.shape[0], 1)).astype(np.float32)


def unite(
    plan: TokenizerPlan,
    named: Path | None,
    base: ModelTensors,
    models: Mapping[str, ModelTensors],
    rows: Mapping[Path, int],
    notes: list[str],
) -> Vocabulary | None:
    """Make the output's vocabulary; None if all are equal and none is changed.

    Args:
        plan: What the file asks for.
        named: Folder of the tokenizer, if the file names one.
        base: The base, or the first model.
        models: All models by name.
        rows: Number of rows of each model's embedding, by folder.
        notes: Notes on the tokens are added here.

    Raises:
        DoRAError: If a tokenizer is missing or cannot be used.
    """
    first, source = base.folder, named or base.folder
    folders = list(dict.fromkeys([first, *(m.folder for m in models.values())]))
    if not (plan.rules or plan.multiple) and len(set(rows.values())) == 1:
        every = dict.fromkeys([*folders, source])
        forms = [TokenizerFile.form_of(folder) for folder in every]
        if all(form == forms[0] for form in forms):
            notes.append("tokenizer: all vocabularies are equal.")
            return None
    files = {folder: TokenizerFile(folder) for folder in folders}
    start = TokenizerFile(source)
    if source in rows:
        start = start.without_unused(rows[source])
    tokens = dict(start.tokens)
    added: list[Mapping[str, object]] = []

    def add(text: str, entry: Mapping[str, object] | None = None) -> None:
        if text not in tokens:
            tokens[text] = start.next_id + len(added)
            added.append(added_entry(text, tokens[text], entry))

    if plan.source == "union":
        for folder in folders:
            own = files[folder]
            for text, i in sorted(own.tokens.items(), key=lambda pair: pair[1]):
                if text not in own.added and i < rows[folder]:
                    add(text)
        for folder in folders:
            for text, entry in files[folder].added.items():
                if files[folder].tokens[text] < rows[folder]:
                    add(text, entry)
    for text in plan.rules:
        add(text)
    count = max(tokens.values()) + 1
    multiple = plan.multiple or 1
    size = -(-count // multiple) * multiple
    notes.append(
        f"tokenizer: that of {source}"
        f"{f', with {len(added)} added tokens' if added else ''}; the embeddings have "
        f"{size} rows, aligned by token."
    )
    places = {f: _rows_of(files[f], tokens, size, rows[f]) for f in folders}
    notes += _notes_on_tokens(plan, tokens, places)
    return Vocabulary(
        tokenizer=start,
        tokens=tokens,
        added=added,
        size=size,
        rows=places,
        own={folder: file.tokens for folder, file in files.items()},
        rules={tokens[text]: rule for text, rule in plan.rules.items()},
        models=models,
        base=base,
    )


def _notes_on_tokens(
    plan: TokenizerPlan, tokens: Mapping[str, int], places: Mapping[Path, np.ndarray]
) -> Iterator[str]:
    """Note the tokens that no model has, and the rules without effect.

    `places` holds, for each model, the row of each output token, or −1.
    """
    known = np.stack(list(places.values())) >= 0
    ordered = sorted(tokens, key=lambda text: tokens[text])
    unknown = [text for text in ordered if not known[:, tokens[text]].any()]
    if unknown := [text for text in unknown if text not in plan.rules]:
        yield (
            f"tokenizer: {len(unknown)} tokens that no model has get embeddings of 0 "
            f"({', '.join(map(repr, unknown[:3]))}{', ...' if unknown[3:] else ''})."
        )
    for text, rule in plan.rules.items():
        if not rule.force and known[:, tokens[text]].all():
            yield (
                f"tokenizer: tokens: {text}: has no effect, since every model has the "
                "token; set force to replace its embeddings."
            )


def _rows_of(
    file: TokenizerFile, tokens: Mapping[str, int], size: int, rows: int
) -> np.ndarray:
    """The row of each output token in one model; −1 if it lacks the token."""
    places = np.full(size, -1, np.int64)
    for text, i in tokens.items():
        row = file.tokens.get(text, -1)
        places[i] = row if row < rows else -1
    return places
