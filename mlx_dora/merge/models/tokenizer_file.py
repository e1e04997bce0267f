"""A model's ``tokenizer.json``: its tokens, and a copy with others added."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import write_text
from mlx_dora.io.foreign import foreign
from mlx_dora.io.json import read_object

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def added_entry(
    text: str, number: int, entry: Mapping[str, object] | None
) -> dict[str, object]:
    """The entry of an added token in ``tokenizer.json``; from another file's entry."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {**plain, "normalized": True, **(entry or {}), "id": number, "content": text}


class TokenizerFile:
    """The tokens of a model.

    Attributes:
        folder: The model's folder.
        tokens: Ids by token, with those that are added.
        added: Entries of the added tokens, by token.

    Raises:
        DoRAError: If the folder has no ``tokenizer.json``, or it is invalid.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / _FILE
        if not path.is_file():
            raise DoRAError(
                f"tokenizer: {folder} has no {_FILE}, which is needed to unite "
                "vocabularies; leave the tokenizer out to keep the base's."
            )
        content = read_object(path)
        model, added = content.get("model"), content.get("added_tokens") or []
        vocabulary: Any = model.get("vocab") if isinstance(model, Mapping) else None
        try:
            if isinstance(vocabulary, list):  # Unigram: pairs of a token and its score
                self.own = {str(pair[0]): i for i, pair in enumerate(vocabulary)}
            else:
                self.own = {str(text): int(i) for text, i in vocabulary.items()}
            self.added = {str(entry["content"]): entry for entry in added}
            numbers = {text: int(entry["id"]) for text, entry in self.added.items()}
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DoRAError(f"{path} has no valid vocabulary.") from error
        self.folder = folder
        self.unused: frozenset[str] = frozenset()
        # As in the tokenizers library, the vocabulary decides, should ids differ.
        self.tokens = {**numbers, **self.own}

    @property
    def next_id(self) -> int:
        """The id that the next added token gets."""
        return max(max(self.tokens.values(), default=-1) + 1, len(self.own))

    def without_unused(self, rows: int) -> "TokenizerFile":
        """The same file without added tokens beyond the rows of the embedding.

        Raises:
            DoRAError: If the vocabulary itself has more tokens than rows.
        """
        if beyond := [text for text, i in self.own.items() if i >= rows]:
            raise DoRAError(
                f"tokenizer: {self.folder}: {len(beyond)} tokens of {_FILE} "
                f"({beyond[0]!r}, ...) have no row in its embedding of {rows} rows."
            )
        changed = TokenizerFile(self.folder)
        changed.unused = frozenset(t for t, i in self.tokens.items() if i >= rows)
        for text in changed.unused:
            del changed.tokens[text], changed.added[text]
        return changed

    @staticmethod
    def form_of(folder: Path) -> object:
        """What determines a model's token ids, for comparison.

        Raises:
            DoRAError: If the folder has no tokenizer.
        """
        if (folder / _FILE).is_file():
            return TokenizerFile(folder).tokens
        if (path := folder / "vocab.json").is_file():
            return read_object(path)
        if (path := folder / "tokenizer.model").is_file():
            return path.read_bytes()
        raise DoRAError(
            f"tokenizer: {folder} has no tokenizer to compare with the others'."
        )

    def write(
        self,
        out: Path,
        tokens: Mapping[str, int],
        added: Sequence[Mapping[str, object]],
    ) -> None:
        """Write the file with other tokens added, over a copy of the folder's files.

        Raises:
            DoRAError: If the tokenizers library gives the tokens other ids.
        """
        path = out / _FILE
        content = read_object(path)
        kept = [e for e in self.added.values() if e["content"] not in self.unused]
        content["added_tokens"] = [*kept, *added]
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")
        config = out / _CONFIG
        if config.is_file():
            settings: dict[str, Any] = read_object(config)
            decoder = settings.get("added_tokens_decoder")
            if isinstance(decoder, dict):
                decoder = {
                    number: entry
                    for number, entry in decoder.items()
                    if entry.get("content") not in self.unused
                }
                settings["added_tokens_decoder"] = decoder | {
                    str(e["id"]): {k: v for k, v in e.items() if k != "id"}
                    for e in added
                }
                write_text(config, json.dumps(settings, indent=2) + "\n")
        from tokenizers import Tokenizer

        with foreign(path):
            made = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
        if made != dict(tokens):
            wrong = sorted(t for t in {*made, *tokens} if made.get(t) != tokens.get(t))
            raise DoRAError(
                f"tokenizer: the vocabulary of {self.folder} cannot be extended: "
                f"{len(wrong)} tokens get other ids ({wrong[0]!r}, ...)."
            )
