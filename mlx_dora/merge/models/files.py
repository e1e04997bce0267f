"""Files of a merged model other than weights: config, tokenizer, chat template."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dora.adapters.hosting import model_folder
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import write_text
from mlx_dora.io.json import read_object
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.settings import count_blocks
from mlx_dora.merge.models.vocabulary import Vocabulary, unite

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_TOKENIZER = (
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
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of the number of blocks in configs."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """Tokenizer of the output.

    Attributes:
        folder: Folder of its files; None keeps the pattern's.
        vocabulary: The vocabulary to extend it to; None keeps it.
        template: The chat template; None keeps the tokenizer's.
    """

    folder: Path | None = None
    vocabulary: Vocabulary | None = None
    template: str | None = None


def choose_tokenizer(
    plan: MergePlan,
    base: ModelTensors,
    models: Mapping[str, ModelTensors],
    notes: list[str],
) -> TokenizerChoice:
    """Choose the tokenizer and the chat template, and unite the vocabularies.

    `base` is the base or the first model; `models` are all models by name.
    """
    folder = vocabulary = None
    if plan.tokenizer is not None:
        named = plan.tokenizer.model
        if named is not None:
            folder = models[named].folder if named in models else model_folder(named)
        rows = {m.folder: m.token_rows for m in (base, *models.values())}
        vocabulary = unite(plan.tokenizer, folder, base, models, rows, notes)
    template = None
    if plan.chat_template is not None:
        folders = list(
            dict.fromkeys([base.folder, *(m.folder for m in models.values())])
        )
        template, note = _choose_template(plan.chat_template, folders)
        notes.append(note)
    return TokenizerChoice(folder=folder, vocabulary=vocabulary, template=template)


def copy_files(pattern: ModelTensors, out: Path, changes: Mapping[str, Any]) -> None:
    """Copy all files except weights from the pattern, with changes to the config."""
    for path in sorted(pattern.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, out / path.name)
    config = {**pattern.config, **changes}
    text = pattern.config.get("text_config")
    if isinstance(text, Mapping):
        inner = {key: value for key, value in changes.items() if key in text}
        config["text_config"] = {**text, **inner}
    (out / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def config_changes(
    plan: MergePlan,
    pattern: ModelTensors,
    models: Mapping[str, ModelTensors],
    choice: TokenizerChoice,
    notes: list[str],
) -> dict[str, Any]:
    """What differs from the pattern's config: dtype, vocabulary, blocks, token ids."""
    changes: dict[str, Any] = {}
    vocabulary, folder = choice.vocabulary, choice.folder
    if plan.dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in pattern.config:
                changes[key] = plan.dtype
    if vocabulary is not None:
        changes["vocab_size"] = vocabulary.size
    elif "vocab_size" in pattern.config:
        sizes = [model.config.get("vocab_size", 0) for model in models.values()]
        changes["vocab_size"] = max(sizes)
    if folder is not None and plan.tokenizer is not None:
        source = read_object(folder / "config.json")
        for key in _TOKEN_IDS:
            if key in source and source[key] != pattern.config.get(key):
                changes[key] = source[key]
                notes.append(f"{key}: that of {plan.tokenizer.model}.")
    if plan.parts:
        changes |= _stacked(plan, pattern, models, notes)
    return changes


def _stacked(
    plan: MergePlan,
    pattern: ModelTensors,
    models: Mapping[str, ModelTensors],
    notes: list[str],
) -> dict[str, Any]:
    """The number of blocks, and lists with an entry for each block."""
    config, changes = pattern.config, {}
    blocks = sum(part.count or 0 for part in plan.parts)
    before = count_blocks(pattern.names)
    for key in BLOCK_COUNTS:
        if key in config:
            changes[key] = blocks
    for key, value in config.items():
        if isinstance(value, list) and len(value) == before > 1:
            made: list[Any] = []
            for part in plan.parts:
                own = models[part.models[0]].config.get(key)
                start, count = part.starts[0], part.count or 0
                entries = own[start : start + count] if isinstance(own, list) else []
                made += entries
            if len(made) != blocks:
                raise DoRAError(f"slices: {key} of the config differs between models.")
            changes[key] = made
            notes.append(f"{key}: one entry for each block, from its own model.")
    return changes


def put_tokenizer(out: Path, choice: TokenizerChoice) -> None:
    """Replace the tokenizer and the chat template, if others were chosen."""
    folder, template, vocabulary = choice.folder, choice.template, choice.vocabulary
    if folder is not None:
        for name in _TOKENIZER:
            (out / name).unlink(missing_ok=True)
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    if vocabulary is not None:
        vocabulary.tokenizer.write(out, vocabulary.tokens, vocabulary.added)
    if template is None:
        return
    (out / "chat_template.json").unlink(missing_ok=True)
    write_text(out / _TEMPLATE, template)
    path = out / _CONFIG
    if path.is_file() and "chat_template" in (config := read_object(path)):
        config["chat_template"] = template
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _choose_template(wanted: str, folders: Sequence[Path]) -> tuple[str | None, str]:
    """Choose the chat template that a merge config asks for, with a note about it.

    ``auto`` takes the most frequent template; among equals, the first model's.

    Returns:
        The template, or None to leave it unchanged; and the note.

    Raises:
        DoRAError: If a model's template file is invalid.
    """
    if wanted == "auto":
        templates = [_read_template(folder) for folder in folders]
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


def _read_template(folder: Path) -> str | None:
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
