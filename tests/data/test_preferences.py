"""Rows of preferences: every form of TRL's, the answers' places, and bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.config import DataConfig
from mlx_dora.data.cut import KeptEnds
from mlx_dora.data.loading import as_dataset, load_datasets
from mlx_dora.data.preferences import LabeledDataset, PairDataset
from mlx_dora.errors import DoRAError

USER = {"role": "user", "content": "What does the function return?"}
SYSTEM = {"role": "system", "content": "the dog"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


GOOD, BAD = says("a string"), says("the lazy dog")
CHAT = (
    "<|im_start|>user\nWhat does the function return?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    return load_tokenizer(str(tiny_model_folder))


def read(rows: list[Any], tokenizer: Any, make: Any = PairDataset, **names: Any) -> Any:
    return as_dataset(rows, tokenizer, DataConfig(**names), "rows", make)


def parts(data: Any, index: int, tokenizer: Any) -> tuple[str, str]:
    """The text before the answer, and the answer."""
    tokens, start = data[index]
    return tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": "a string", "rejected": "the lazy dog"},
        {
            "chosen": json.dumps([USER, GOOD]),
            "rejected": json.dumps([USER, BAD]),
            "score": 1,
        },
        {
            "chosen": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": "a string"},
            ],
            "rejected": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": "the lazy dog"},
            ],
        },
    ],
    ids=[
        *("explicit", "implicit", "text prompt", "text prompt again"),
        *("text answers", "cells of a table", "ShareGPT"),
    ],
)
def test_every_form_of_a_chat_reads_alike(row: dict[str, Any], tokenizer: Any) -> None:
    data = read([row], tokenizer)
    assert len(data) == 2
    assert parts(data, 0, tokenizer) == (CHAT, "a string<|im_end|>\n")
    assert parts(data, 1, tokenizer) == (CHAT, "the lazy dog<|im_end|>\n")
    assert data.where(1) == "rows, row 0 (rejected)"


def test_a_prompt_of_several_turns_ends_where_the_answers_begin(tokenizer: Any) -> None:
    turns = [SYSTEM, USER, says("the fox"), USER]
    data = read([{"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}], tokenizer)
    before, answer = parts(data, 0, tokenizer)
    assert before.count("<|im_start|>") == 5
    assert answer == "a string<|im_end|>\n"
    assert "chat, prompt in both" in data.reading


def test_an_answer_of_several_turns_counts_from_its_first(tokenizer: Any) -> None:
    row = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}
    answer = parts(read([row], tokenizer), 0, tokenizer)[1]
    assert answer.startswith("a string<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        (
            {"prompt": "the quick", "chosen": " fox", "rejected": " dog"},
            "the quick",
            " fox",
        ),
        ({"chosen": "the quick fox", "rejected": "the quick dog"}, "the quick", " fox"),
        (
            {
                "chosen": "\n\nHuman: over?\n\nAssistant: the fox",
                "rejected": "\n\nHuman: over?\n\nAssistant: the dog",
            },
            "\n\nHuman: over?\n\nAssistant:",
            " the fox",
        ),
    ],
    ids=["explicit", "implicit", "transcript"],
)
def test_text_is_read_as_it_stands_and_ends(
    row: dict[str, str], prompt: str, chosen: str, tokenizer: Any
) -> None:
    data = read([row], tokenizer)
    assert parts(data, 0, tokenizer) == (prompt, f"{chosen}<|im_end|>")
    tokens = data[0][0]
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert "plain text, without the chat template" in data.reading


def test_both_answers_start_at_one_place(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # A token crosses the border of the prompt and the chosen answer.
    row = {"prompt": "the quick ", "chosen": "fox", "rejected": "7"}
    data = read([row, row], tokenizer)
    (chosen, start), (rejected, other) = data[0], data[1]
    assert start == other < len(tokenizer.encode("the quick "))
    assert chosen[:start] == rejected[:start]
    assert parts(data, 0, tokenizer) == ("the quick", " fox<|im_end|>")
    assert parts(data, 1, tokenizer) == ("the quick", " 7<|im_end|>")
    assert data[2]
    assert caplog.text.count("the last tokens of the prompt change") == 1


def test_labels_are_read_and_pairs_become_labels(tokenizer: Any) -> None:
    rows = [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": [USER], "completion": [BAD], "label": "false"},
        {"prompt": [USER], "completion": [BAD], "label": 1},
    ]
    data = read(rows, tokenizer, LabeledDataset)
    assert [data.label(index) for index in range(3)] == [True, False, True]
    assert parts(data, 1, tokenizer) == (CHAT, "the lazy dog<|im_end|>\n")
    pairs = read(
        [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}], tokenizer, LabeledDataset
    )
    assert [pairs.label(index) for index in range(2)] == [True, False]
    assert parts(pairs, 0, tokenizer)[1] == "a string<|im_end|>\n"


def test_columns_can_be_named(tokenizer: Any) -> None:
    data = read(
        [{"question": "the", "answer": " fox", "label": False}],
        tokenizer,
        LabeledDataset,
        prompt_feature="question",
        completion_feature="answer",
    )
    assert parts(data, 0, tokenizer) == ("the", " fox<|im_end|>")


def test_equal_answers_are_left_out_and_counted(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    same = {"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}
    other = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    data = read([other, same, other], tokenizer)
    assert len(data) == 4
    assert data.where(2) == "rows, row 2 (chosen)"
    assert "in 1 of 3 rows" in caplog.text
    assert "row 1" in caplog.text
    with pytest.raises(DoRAError, match="in every row"):
        read([same], tokenizer)


PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER], "chosen": [GOOD]}, "found 'prompt', 'chosen' without rej"),
        ([1, 2], "expected a JSON object"),
        ({**PAIR, "rejected": "text"}, "write both in one form"),
        ({**PAIR, "rejected": 7}, "'rejected' must be text or a list of messages, got"),
        ({**PAIR, "rejected": []}, "'rejected' holds no message"),
        ({**PAIR, "rejected": [{"role": "asistant", "content": "x"}]}, "unknown role"),
        ({**PAIR, "rejected": [{"content": "x"}]}, "needs the keys 'role'"),
        ({**PAIR, "chosen": [says("\ud83d")]}, "half of a surrogate pair"),
    ],
)
def test_a_bad_pair_is_named_in_one_line(
    row: Any, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DoRAError) as caught:
        load_datasets(
            DataConfig(data=str(tmp_path)), tokenizer, ("train",), PairDataset
        )
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert f"{path}, line 3" in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "expected the columns 'chosen' and 'rejected', optionally"),
        ({"chosen": "a fox", "rejected": "the dog"}, "have no common start"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "share no first turn"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER]},
            "do not end in different turns",
        ),
    ],
)
def test_rows_without_two_answers_are_refused(
    row: dict[str, Any], message: str, tokenizer: Any
) -> None:
    with pytest.raises(DoRAError, match=message):
        read([row], tokenizer)


@pytest.mark.parametrize("label", ["maybe", 2, [1], 0.5])
def test_a_label_is_true_or_false(label: Any, tokenizer: Any) -> None:
    row = {"prompt": "the", "completion": " fox", "label": label}
    with pytest.raises(DoRAError, match=r"row 0: 'label' must be true \(desirable\)"):
        read([row], tokenizer, LabeledDataset)
    with pytest.raises(DoRAError, match="'prompt', 'completion', 'label', or 'chosen'"):
        read([{"prompt": "the", "completion": " fox"}], tokenizer, LabeledDataset)


def test_kept_ends_cut_the_start_and_move_the_targets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Rows(PairDataset):
        def __init__(self) -> None:
            self._cache = [  # pyright: ignore[reportIncompatibleVariableOverride]
                ([1, 2, 3, 4, 5, 6], 4),
                ([1, 2, 3], 1),
                ([1, 2, 3, 4, 5, 6], 1),
                ([1, 2, 3, 4, 5, 6], ((1, 3), (5, 6))),
            ]
            self._places = [(index, "chosen") for index in range(4)]

    data = KeptEnds(Rows(), 4)
    assert [data[index] for index in range(4)] == [
        ([3, 4, 5, 6], 2),
        ([1, 2, 3], 1),
        ([3, 4, 5, 6], 0),
        ([3, 4, 5, 6], ((0, 1), (3, 4))),
    ]
    assert "3 of 4 rows are longer than max_seq_length 4" in caplog.text
