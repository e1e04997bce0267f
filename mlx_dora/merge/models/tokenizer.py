"""Which tokenizer and chat template a merged model gets."""

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
    """Refuse models whose tokens have other numbers than the first model's.

    Raises:
        DoRAError: Naming the models that differ, or that have no tokenizer to compare.
    """
    first, *others = folders
    own = _vocabulary(first, key)
    for other in others:
        if _vocabulary(other, key) != own:
            raise DoRAError(
                f"{key}: the vocabularies of {first} and {other} differ, and merging "
                "token by token is not supported; leave the key out (--pad merges "
                "embeddings of unlike sizes row by row)."
            )


def _vocabulary(folder: Path, key: str) -> object:
    """Numbers of the tokens, or what determines them; comparable."""
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
    """Put the tokenizer files of one model in place of another's."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def choose_template(wanted: str, folders: Sequence[Path]) -> tuple[str | None, str]:
    """The chat template that a merge config asks for, and a note about it.

    Args:
        wanted: ``auto`` for the template that most models have, or a template's text.
        folders: The models; of equally frequent templates the first model's is taken.

    Returns:
        None to leave the template as it is.

    Raises:
        DoRAError: If the text is no template.
    """
    if wanted == "auto":
        templates = [read_template(folder) for folder in folders]
        stripped = [text.strip() for text in templates if text]
        if not stripped:
            return None, "chat_template: auto has no effect: no model has a template."
        template, count = Counter(stripped).most_common(1)[0]
        return template, f"chat_template: that of {count} of {len(folders)} models."
    if "{" not in wanted:
        return None, (
            f"chat_template: {wanted} is a template of mergekit's own and is not "
            "shipped here; the output keeps its tokenizer's. Give the template's text "
            "to change it."
        )
    return wanted, "chat_template: the config's own."


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
