import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.data.config import DataConfig
from mlx_dora.data.files import find_files
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.splits import read_splits
from mlx_dora.errors import DoRAError


def texts(*words: str) -> str:
    return "".join(json.dumps({"text": word}) + "\n" for word in words)


def read(data: Path, **settings: Any) -> dict[str, list[str]]:
    """The texts of each split."""
    splits = read_splits(DataConfig(data=str(data), **settings))
    return {
        name: [row["text"] for rows in parts for row in rows.values]
        for name, parts in splits.items()
    }


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
def test_the_validation_file_has_any_of_the_usual_names(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text("id,text\n1,a\n2,b\n")
    (tmp_path / f"{name}.json").write_text('[{"text": "c"}]')
    assert read(tmp_path) == {"train": ["a", "b"], "valid": ["c"], "test": []}


def test_shards_of_a_hub_repository_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a data set")
    (tmp_path / "data").mkdir()
    for number, word in enumerate("ab"):
        path = tmp_path / "data" / f"train-0000{number}-of-00002.jsonl"
        path.write_text(texts(word))
    assert read(tmp_path)["train"] == ["a", "b"]


def test_a_single_file_is_the_training_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("text\tid\na, b\t1\n")
    assert read(path)["train"] == read(tmp_path)["train"] == ["a, b"]


def test_unclear_folders_say_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\na\n")
    (tmp_path / "two.csv").write_text("text\na\n")
    with pytest.raises(DoRAError, match=r"holds one\.csv, two\.csv: expected train\."):
        find_files(tmp_path)
    (tmp_path / "notes.xlsx").write_text("")
    with pytest.raises(DoRAError, match=r"notes\.xlsx: unknown kind of file; .*\.csv"):
        read(tmp_path / "notes.xlsx")


def test_of_two_kinds_of_one_split_the_first_is_read_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.csv").write_text("text\na\n")
    (tmp_path / "train.jsonl").write_text(texts("b"))
    assert read(tmp_path)["train"] == ["b"]
    assert "train.jsonl is read; train.csv beside it is not" in caplog.text


def test_a_tenth_of_the_rows_validates_if_no_file_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlx_dora.data")
    words = [f"w{number}" for number in range(25)]
    (tmp_path / "train.jsonl").write_text(texts(*words))
    first = read(tmp_path)
    assert "2 of 25 training rows" in caplog.text
    assert "--valid-share 0.1; 0 for none" in caplog.text
    assert len(first["valid"]) == 2
    assert sorted(first["train"] + first["valid"]) == sorted(words)
    assert first["train"] == [word for word in words if word not in first["valid"]]
    # Another command, which reads one split, holds out the same rows.
    (valid,) = read_splits(DataConfig(data=str(tmp_path)), ["valid"])["valid"]
    assert [row["text"] for row in valid.values] == first["valid"]
    assert valid.where(0) == f"{tmp_path}/train.jsonl, line {words.index('w12') + 1}"
    assert len(read(tmp_path, valid_share=0.4)["valid"]) == 10
    assert read(tmp_path, valid_share=0)["valid"] == []
    (tmp_path / "valid.jsonl").write_text(texts("v"))
    assert read(tmp_path) == {"train": words, "valid": ["v"], "test": []}


BAD_TABLES = {
    "too many cells": ("prompt,completion\na,b\na,b,c\n", r"line 3: expected 2 cells"),
    "after a long row": ('text\n"a\nb"\n\nc,d\n', r"line 5: expected 1 cells"),
    "open quote": ('text\nfine\n"a\n', r"line 3: not CSV: unexpected end"),
    "no header": ("", r"line 1: expected the names of the columns, .*got nothing"),
    "twice": ("text,text\na,b\n", r"line 1: .* all different; got 'text', 'text'"),
    "no rows": ("text\n", r"is empty: expected rows below"),
    "not UTF-8": ("text\n\udcff\n", r"is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    content, message = BAD_TABLES[name]
    path = tmp_path / "train.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DoRAError, match=rf"train\.csv.*{message}"):
        read(tmp_path)


def test_a_broken_array_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + "[" * 100_000)
    with pytest.raises(DoRAError, match="the JSON array from line 2, is"):
        read(path)


def test_a_table_of_excel_has_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbftext;id\r\na, b;1\r\n")
    assert read(tmp_path)["train"] == ["a, b"]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DoRAError, match=r"cannot load .*train\.parquet"):
        read(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DoRAError, match=r"needs .* pyarrow: pip install pyarrow"):
        read(tmp_path)


def test_forgotten_data_is_said() -> None:
    with pytest.raises(DoRAError, match=r"^--data was not given: name a folder, a fil"):
        read_splits(DataConfig())


def test_the_hub_says_validation_and_train_alone_is_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import types

    def load_dataset(name: str) -> dict[str, list[Any]]:
        rows = [{"text": f"{name} {number}"} for number in range(10)]
        return {"train": rows} | ({"validation": rows[:3]} if name == "x/both" else {})

    errors = types.SimpleNamespace(DatasetsError=RuntimeError)
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    both = read(Path("x/both"))
    assert both["valid"] == ["x/both 0", "x/both 1", "x/both 2"]
    assert len(both["train"]) == 10
    alone = read(Path("x/alone"))
    assert (len(alone["train"]), len(alone["valid"])) == (9, 1)


def test_reading_says_the_format_and_the_columns(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_lm.utils import load_tokenizer

    caplog.set_level(logging.INFO, "mlx_dora.data")
    path = tmp_path / "a.csv"
    path.write_text("id,instruction,input,output\n1,add,2 2,4\n2,add,1 1,2\n")
    tokenizer = load_tokenizer(tiny_model_folder)
    load_datasets(DataConfig(data=str(path)), tokenizer)
    load_datasets(DataConfig(data=str(path), mask_prompt=True), tokenizer)
    read = (
        f"Data: 2 train rows ({path}); Alpaca (instruction, output, input, without id)"
    )
    counted = "; the loss counts prompts, too (mask_prompt: answers only)"
    assert caplog.messages == [read + counted, read]


def test_a_column_named_by_a_flag_decides_the_format(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(tiny_model_folder)
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output,note\nadd,2 2,4,sums\n")
    cases: tuple[tuple[dict[str, Any], str, str], ...] = (
        ({}, "alpaca", "user\nadd\n\n2 2<|im_end|>"),
        ({"text_feature": "note"}, "text", "sums<|im_end|>"),
        (
            {"prompt_feature": "note", "completion_feature": "output"},
            "completions",
            "user\nsums<|im_end|>",
        ),
    )
    for settings, kind, text in cases:
        config = DataConfig(data=str(path), **settings)
        train = load_datasets(config, tokenizer)["train"]
        assert train is not None
        assert train.kind == kind  # pyright: ignore[reportAttributeAccessIssue]
        assert text in tokenizer.decode(train[0][0])
