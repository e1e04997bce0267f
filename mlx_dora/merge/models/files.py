"""Files of a merged model other than weights: config, tokenizer, chat template."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_dora.adapters.hosting import model_folder
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import write_text
from mlx_dora.io.json import read_object
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.plan import MergePlan

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
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def choose_tokenizer(
    plan: MergePlan,
    pattern: ModelTensors,
    inputs: Sequence[ModelTensors],
    notes: list[str],
) -> tuple[Path | None, str | None]:
    """Choose the tokenizer's folder and the chat template; None keeps the pattern's."""
    folders = list(dict.fromkeys([pattern.folder, *(model.folder for model in inputs)]))
    tokenizer = None
    if plan.tokenizer is not None:
        if plan.tokenizer_model is not None:
            tokenizer = model_folder(plan.tokenizer_model)
        _check_vocabularies(list(dict.fromkeys([*folders, tokenizer or folders[0]])))
        notes.append("tokenizer: all vocabularies are equal.")
    if plan.chat_template is None:
        return tokenizer, None
    template, note = _choose_template(plan.chat_template, folders)
    notes.append(note)
    return tokenizer, template


def copy_files(
    pattern: ModelTensors,
    out: Path,
    dtype: str | None,
    inputs: Sequence[ModelTensors],
) -> None:
    """Copy all files except weights from the pattern, and update the config."""
    for path in sorted(pattern.folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, out / path.name)
    config = dict(pattern.config)
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
    if "vocab_size" in config:
        sizes = [model.config.get("vocab_size", 0) for model in (pattern, *inputs)]
        config["vocab_size"] = max(sizes)
    (out / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def put_tokenizer(out: Path, tokenizer: Path | None, template: str | None) -> None:
    """Replace the tokenizer and the chat template, if others were chosen."""
    if tokenizer is not None:
        for name in _TOKENIZER:
            (out / name).unlink(missing_ok=True)
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, out / name)
    if template is None:
        return
    (out / "chat_template.json").unlink(missing_ok=True)
    write_text(out / _TEMPLATE, template)
    path = out / _CONFIG
    if path.is_file() and "chat_template" in (config := read_object(path)):
        config["chat_template"] = template
        write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _check_vocabularies(folders: Sequence[Path], key: str = "tokenizer_source") -> None:
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
