"""Files of a merged model other than weights: config, tokenizer, chat template."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mlx_dora.adapters.hosting import model_folder
from mlx_dora.merge.models.model_tensors import ModelTensors
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.tokenizer import (
    check_vocabularies,
    choose_template,
    copy_tokenizer,
    write_template,
)

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


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
        check_vocabularies(list(dict.fromkeys([*folders, tokenizer or folders[0]])))
        notes.append("tokenizer: all vocabularies are equal.")
    if plan.chat_template is None:
        return tokenizer, None
    template, note = choose_template(plan.chat_template, folders)
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
        copy_tokenizer(tokenizer, out)
    if template is not None:
        write_template(out, template)
