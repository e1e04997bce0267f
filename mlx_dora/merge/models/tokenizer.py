"""Chooses the tokenizer and chat template of a merged model."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import write_text
from mlx_dora.io.json import read_object

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def check_vocabularies(folders: Sequence[Path], key: str = "tokenizer_source") -> None:
    """Refuse models whose token ids differ from the first model's.

    Raises:
        DoRAError: Naming the models that differ or have no tokenizer.
    """
    first, *others = folders
    own = _vocabulary(first, key)
    for other in others:
        if _vocabulary(other, key) != own:
            raise DoRAError(
                f"{key}: the vocabularies of {first} and {other} differ, and merging "
                "token by token is not supported; leave the key out (--pad merges "
                "embeddings of different sizes row by row)."
            )


def _vocabulary(folder: Path, key: str) -> object:
    """Token ids, or data that determines them, for comparison."""
    if (path := folder / "tokenizer.json").is_file():
        content = read_object(path)
        model, added = content.get("model"), content.get("added_tokens")
        tokens = model.get("vocab") if isinstance(model, Mapping) else None
        return tokens, _added(added)
    if (path := folder / "vocab.json").is_file():
        return read_object(path)
    if (path := folder / "tokenizer.model").is_file():
        return path.read_bytes()
    raise DoRAError(f"{key}: {folder} has no tokenizer to compare with the others'.")


def _added(tokens: Any) -> object:
    if not isinstance(tokens, list):
        return tokens
    pairs = [(t.get("id"), t.get("content")) for t in tokens if isinstance(t, Mapping)]
    return sorted(map(str, pairs))


def copy_tokenizer(source: Path, out: Path) -> None:
    """Replace a model's tokenizer files with those of another model."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def choose_template(wanted: str, folders: Sequence[Path]) -> tuple[str | None, str]:
    """Choose the chat template that a merge config asks for, with a note about it.

    Args:
        wanted: ``auto`` for the most frequent template, or a template's text.
        folders: The models; among equally frequent templates the first model's wins.

    Returns:
        The template, or None to leave it unchanged; and the note.

    Raises:
        DoRAError: If a model's template file is invalid.
    """
    if wanted == "auto":
        templates = [read_template(folder) for folder in folders]
        stripped = [text.strip() for text in templates if text]
        if not stripped:
            return None, "chat_template: auto has no effect: no model has a template."
        template, count = Counter(stripped).most_common(1)[0]
        return template, f"chat_template: from {count} of {len(folders)} models."
    if "{" not in wanted:
        return None, (
            f"chat_template: {wanted} is a built-in template of mergekit and is not "
            "shipped here; the output keeps its tokenizer's. Give the template's text "
            "to change it."
        )
    return wanted, "chat_template: set by the config."


def read_template(folder: Path) -> str | None:
    """A model's default chat template; None if it has none."""
    if (path := folder / _TEMPLATE).is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DoRAError(f"{path} is not UTF-8 text: {error}.") from error
    for name in ("chat_template.json", _CONFIG):
        if (path := folder / name).is_file():
            template = read_object(path).get("chat_template")
            if isinstance(template, list):
                named = [t for t in template if isinstance(t, Mapping)]
                default = [t for t in named if t.get("name") == "default"]
                template = default[-1].get("template") if default else None
            if isinstance(template, str):
                return template
    return None


def write_template(out: Path, template: str) -> None:
    """Make a template the chat template of a model folder."""
    (out / "chat_template.json").unlink(missing_ok=True)
    write_text(out / _TEMPLATE, template)
    path = out / _CONFIG
    if path.is_file() and "chat_template" in (config := read_object(path)):
        config["chat_template"] = template
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
