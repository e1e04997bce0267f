"""Every format, file and mask: the trained tokens, decoded, as a reader marks them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.data import DataConfig, TokenDataset, load_datasets, target_spans
from mlx_dora.data.formats import FORMATS, docs_table

TABLE = {
    "prompt and completion": [
        {"prompt": "the fox", "completion": "jumps"},
        {"prompt": 'a, "b"', "completion": "two\nlines"},
    ],
    "Alpaca": [
        {"instruction": "name it", "input": "a dog", "output": "Rex"},
        {"instruction": "say hi", "input": "", "output": "hi"},
    ],
    "OpenAI messages": [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "2"},
            ]
        },
        {"messages": [{"role": "user", "content": "unanswered"}]},
    ],
    "ShareGPT": [
        {
            "system": "be kind",
            "conversations": [
                {"from": "human", "value": "one"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "two"},
                {"from": "gpt", "value": "2"},
            ],
        },
        {"system": "", "conversations": [{"from": "human", "value": "unanswered"}]},
    ],
    "plain text": [{"text": "the quick"}, {"text": "the lazy dog"}],
}

# What stands in the loss, by row; a row's first token never does, since nothing
# predicts it. "|" separates spans.
WHOLE = {
    "prompt and completion": [
        "user\nthe fox<|im_end|>\n<|im_start|>assistant\njumps<|im_end|>\n",
        'user\na, "b"<|im_end|>\n<|im_start|>assistant\ntwo\nlines<|im_end|>\n',
    ],
    "Alpaca": [
        "user\nname it\n\na dog<|im_end|>\n<|im_start|>assistant\nRex<|im_end|>\n",
        "user\nsay hi<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n",
    ],
    "OpenAI messages": [
        "system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n",
        "user\nunanswered<|im_end|>\n",
    ],
    "ShareGPT": [
        "system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n",
        "user\nunanswered<|im_end|>\n",
    ],
    "plain text": [" quick<|im_end|>", " lazy dog<|im_end|>"],
}
ANSWERS = {
    "prompt and completion": ["jumps<|im_end|>\n", "two\nlines<|im_end|>\n"],
    "Alpaca": ["Rex<|im_end|>\n", "hi<|im_end|>\n"],
}
EXPECTED = {
    "none": WHOLE,
    "mask_prompt": ANSWERS
    | {
        "OpenAI messages": ["2<|im_end|>\n", ""],
        "ShareGPT": ["2<|im_end|>\n", ""],
    },
    "all_turns": ANSWERS
    | {
        "OpenAI messages": ["1<|im_end|>\n|2<|im_end|>\n", ""],
        "ShareGPT": ["1<|im_end|>\n|2<|im_end|>\n", ""],
    },
}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = row.items()
            texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in cells}
            writer.writerow(texts)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tiny_model_folder)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    ("mask", "name"), [(mask, name) for mask in EXPECTED for name in EXPECTED[mask]]
)
def test_the_trained_tokens_are_those_that_a_reader_marks(
    mask: str, name: str, ending: str, tokenizer: Any, tmp_path: Path
) -> None:
    WRITERS[ending](tmp_path / f"train.{ending}", TABLE[name])
    flags: dict[str, Any] = {} if mask == "none" else {mask: True}
    train = load_datasets(DataConfig(data=str(tmp_path), **flags), tokenizer)["train"]
    assert isinstance(train, TokenDataset)
    assert train.format.title == name
    texts = []
    for tokens, targets in train:
        spans = target_spans(targets, len(tokens))
        texts.append("|".join(tokenizer.decode(tokens[a:b]) for a, b in spans))
    assert texts == EXPECTED[mask][name]


def test_every_format_stands_in_the_matrix_and_in_the_documentation() -> None:
    assert set(TABLE) == {format.title for format in FORMATS}
    page = Path(__file__).parent.parent.parent / "docs" / "data.md"
    assert docs_table() in page.read_text(encoding="utf-8"), docs_table()
