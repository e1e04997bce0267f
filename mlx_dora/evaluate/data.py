"""Rows of text, completions or chats as token sequences, made when first needed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.config import DataConfig
from mlx_dora.evaluate.rows import SPLITS, Rows, read_splits

logger = logging.getLogger(__name__)

Kind = Literal["completions", "chat", "text", "tokens"]
Spans = tuple[tuple[int, int], ...]
Example = tuple[list[int], int | Spans]
"""Tokens, and which of them may be targets: all from a position on, or some spans."""


def target_spans(targets: int | Spans, length: int) -> Spans:
    """The spans ``[start, end)`` of targets among the first `length` tokens.

    A row's very first token is never a target: nothing comes before it.
    """
    spans = ((targets, length),) if isinstance(targets, int) else targets
    cut = ((max(start, 1), min(end, length)) for start, end in spans)
    return tuple((start, end) for start, end in cut if start < end)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A conversation cut before its last answer.

    Args:
        prompt: Tokens up to where the answer starts.
        answer: Tokens of the answer, the end of the turn included.
    """

    prompt: list[int]
    answer: list[int]


class TokenDataset:
    """A sequence of ``(tokens, first_target)``, tokenised row by row on first use.

    ``first_target`` is 0, or with ``mask_prompt`` the position where the completion
    starts. All rows are checked when the data set is made: what is wrong with them is
    told before a model trains. A row is what mlx-lm takes, or already a list of tokens,
    or a pair of tokens and first target.

    Args:
        rows: The rows and the names of their features.
        tokenizer: mlx-lm's tokenizer.

    Raises:
        DoRAError: If a row does not have the form of the first one; the message names
            the file, the line, and the keys that were expected and found.
    """

    def __init__(self, rows: Rows, tokenizer: Any) -> None:
        self.rows = rows
        self.kind = _kind(rows)
        self._tokenizer = tokenizer
        self._cache: list[Example | None] = [None] * len(rows.values)
        self._told_prefix = False
        self._masks = rows.config.mask_prompt or rows.config.all_turns
        if self.kind == "text" and self._masks:
            name = "mask_prompt" if rows.config.mask_prompt else "all_turns"
            raise DoRAError(
                f"{rows.source}: {name} needs completions or chat data; plain text has "
                "no prompt."
            )
        for index in range(len(rows.values)):
            _check(rows, index, self.kind)
        if len(self):
            self[0]

    def __len__(self) -> int:
        return len(self.rows.values)

    def __getitem__(self, index: int) -> Example:
        example = self._cache[index]
        if example is None:
            example = self._cache[index] = self._encode(index)
        return example

    def where(self, index: int) -> str:
        """Name a row by file and line, for a message."""
        return self.rows.where(index)

    def answer(self, index: int) -> str | None:
        """The last answer of a row; None for plain text and where no answer ends it."""
        messages = self._messages(index)
        if not messages or messages[-1].get("role") != "assistant":
            return None
        text = messages[-1].get("content")
        return text if isinstance(text, str) else None

    def parts(self, index: int, answer: str) -> Parts:
        """Cut a row that has an `answer` before it, and put this one in its place."""
        messages = self._messages(index) or []
        messages = [*messages[:-1], {**messages[-1], "content": answer}]
        tokens = self._template(index, messages, generation=False)
        start = self._prompt_length(index, messages, tokens)
        return Parts(prompt=tokens[:start], answer=tokens[start:])

    def _messages(self, index: int) -> list[Any] | None:
        row, config = self.rows.values[index], self.rows.config
        if self.kind == "completions":
            return [
                {"role": "user", "content": row[config.prompt_feature]},
                {"role": "assistant", "content": row[config.completion_feature]},
            ]
        return list(row[config.chat_feature]) if self.kind == "chat" else None

    def _encode(self, index: int) -> Example:
        row, config = self.rows.values[index], self.rows.config
        if self.kind == "tokens":
            return _token_row(row)
        if self.kind == "text":
            tokens = list(self._tokenizer.encode(row[config.text_feature]))
            end = self._tokenizer.eos_token_id
            return (tokens if tokens[-1:] == [end] else [*tokens, end]), 0
        messages = self._messages(index) or []
        tokens = self._template(index, messages, generation=False)
        if not self._masks:
            return tokens, 0
        if self.kind == "chat" and config.all_turns:
            return tokens, self._turns(index, messages, tokens)
        return tokens, self._prompt_length(index, messages, tokens)

    def _turns(self, index: int, messages: list[Any], tokens: list[int]) -> Spans:
        """Where the assistant's turns stand in a row's tokens."""
        spans = []
        for place, message in enumerate(messages, start=1):
            if message.get("role") != "assistant":
                continue
            start = self._prompt_length(index, messages[:place], tokens)
            until = self._template(index, messages[:place], generation=False)
            end = _shared(until, tokens)
            if end < len(until):
                self._tell_prefix(index, end)
            spans.append((start, end))
        return tuple(spans)

    def _template(self, index: int, messages: list[Any], *, generation: bool) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=self.rows.values[index].get("tools"),
                add_generation_prompt=generation,
                return_dict=False,
            )
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            reason = " ".join(str(error).split())
            raise DoRAError(
                f"{self.where(index)}: the model's chat template does not take this "
                f"row: {reason}"
            ) from error

    def _prompt_length(self, index: int, messages: list[Any], tokens: list[int]) -> int:
        generation = messages[-1].get("role") == "assistant"
        prompt = self._template(index, messages[:-1], generation=generation)
        shared = _shared(prompt, tokens)
        if shared < min(len(prompt), len(tokens)):
            self._tell_prefix(index, shared)
        return shared

    def _tell_prefix(self, index: int, shared: int) -> None:
        if not self._told_prefix:
            self._told_prefix = True
            logger.warning(
                "%s: the chat template writes the same messages differently with and "
                "without what follows them; only the %d tokens they share count",
                self.where(index),
                shared,
            )


class JoinedDataset:
    """Several data sets one after the other."""

    def __init__(self, parts: Sequence[TokenDataset]) -> None:
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        part, i = self._places[index]
        return part[i]

    def where(self, index: int) -> str:
        """Name a row by its origin."""
        part, i = self._places[index]
        return part.where(i)

    def answer(self, index: int) -> str | None:
        """The last answer of a row, as `TokenDataset.answer`."""
        part, i = self._places[index]
        return part.answer(i)

    def parts(self, index: int, answer: str) -> Parts:
        """A row cut before its last answer, as `TokenDataset.parts`."""
        part, i = self._places[index]
        return part.parts(i, answer)


Dataset = TokenDataset | JoinedDataset


def load_datasets(
    config: DataConfig, tokenizer: Any, names: Sequence[str] = SPLITS
) -> dict[str, Dataset | None]:
    """Read and check the named splits of a data set; None for one that is not there.

    Raises:
        DoRAError: If the data set does not exist or a row is malformed.
    """
    return make_datasets(read_splits(config, names), tokenizer)


def make_datasets(
    splits: dict[str, list[Rows]], tokenizer: Any
) -> dict[str, Dataset | None]:
    """Check rows that `read_splits` has read, and make data sets of them.

    Raises:
        DoRAError: If a row is malformed.
    """
    loaded: dict[str, Dataset | None] = {}
    for name, parts in splits.items():
        sets = [TokenDataset(rows, tokenizer) for rows in parts]
        loaded[name] = JoinedDataset(sets) if len(sets) > 1 else next(iter(sets), None)
    return loaded


def as_dataset(data: Any, tokenizer: Any, config: DataConfig, name: str) -> Dataset:
    """Take a data set of ours, or any sequence of rows, as a data set.

    Raises:
        DoRAError: If a row is malformed or there is none.
    """
    if isinstance(data, TokenDataset | JoinedDataset):
        return data
    if len(data) == 0:
        raise DoRAError(f"{name} is empty.")
    return TokenDataset(Rows(values=data, source=name, config=config), tokenizer)


def _kind(rows: Rows) -> Kind:
    if not len(rows.values):
        raise DoRAError(f"{rows.source} has no rows.")
    first, config = rows.values[0], rows.config
    if not isinstance(first, Mapping):
        return "tokens"
    if config.prompt_feature in first and config.completion_feature in first:
        return "completions"
    if config.chat_feature in first:
        return "chat"
    if config.text_feature in first:
        return "text"
    raise DoRAError(
        f"{rows.where(0)}: expected the keys {config.prompt_feature!r} and "
        f"{config.completion_feature!r}, or {config.chat_feature!r}, or "
        f"{config.text_feature!r}; found {_keys(first)}."
    )


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"


def _check(rows: Rows, index: int, kind: Kind) -> None:
    row, config = rows.values[index], rows.config
    if kind == "tokens":
        _check_tokens(rows, index)
        return
    if not isinstance(row, Mapping):
        kind_of = type(row).__name__
        raise DoRAError(f"{rows.where(index)}: expected a mapping, got a {kind_of}.")
    expected = {
        "completions": (config.prompt_feature, config.completion_feature),
        "chat": (config.chat_feature,),
        "text": (config.text_feature,),
    }[kind]
    missing = [key for key in expected if key not in row]
    if missing:
        wanted = " and ".join(repr(key) for key in expected)
        noun = "key" if len(expected) == 1 else "keys"
        raise DoRAError(
            f"{rows.where(index)}: expected the {noun} {wanted}, as in the first row; "
            f"found {_keys(row)}."
        )
    for key in expected:
        if kind == "chat":
            _check_messages(rows, index, key)
        elif not isinstance(row[key], str):
            raise DoRAError(
                f"{rows.where(index)}: {key!r} must be text, got "
                f"{type(row[key]).__name__}."
            )


def _check_messages(rows: Rows, index: int, key: str) -> None:
    messages = rows.values[index][key]
    where = f"{rows.where(index)}: {key!r}"
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        kind_of = type(messages).__name__
        raise DoRAError(f"{where} must be a list of messages, got {kind_of}.")
    if not messages:
        raise DoRAError(f"{where} holds no message.")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            found = _keys(message) if isinstance(message, Mapping) else repr(message)
            raise DoRAError(
                f"{where}: each message needs the key 'role'; found {found}."
            )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    differ = (place for place, (a, b) in pairs if a != b)
    return next(differ, min(len(one), len(other)))


def _token_row(row: Any) -> Example:
    if len(row) != 2 or not isinstance(row[0], Sequence):
        return list(row), 0
    tokens, targets = row
    if isinstance(targets, Sequence):
        return list(tokens), tuple((int(a), int(b)) for a, b in targets)
    return list(tokens), int(targets)


def _check_tokens(rows: Rows, index: int) -> None:
    row = rows.values[index]
    if isinstance(row, Sequence) and not isinstance(row, str):
        tokens, _ = _token_row(row)
        if all(isinstance(token, int) for token in tokens):
            return
    raise DoRAError(
        f"{rows.where(index)}: expected a mapping such as {{'text': ...}} or a list of "
        f"token ids, got {type(row).__name__}."
    )
