import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.data.config import DataConfig
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.dataset import TokenDataset
from mlx_dora.data.loading import as_dataset, load_datasets
from mlx_dora.data.rows import Rows
from mlx_dora.data.targets import IncompleteSpans, target_spans
from mlx_dora.errors import DoRAError

MESSAGES = [
    {"role": "user", "content": "What does the fox do?"},
    {"role": "assistant", "content": "It jumps."},
]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "the quick brown fox"},
    "completions": {"prompt": "What does the fox do?", "completion": "It jumps."},
    "chat": {"messages": MESSAGES},
}
MASKED = ("text", True)  # plain text has no prompt


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tiny_model_folder)


def write(folder: Path, name: str, *lines: Any) -> Path:
    path = folder / f"{name}.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n")
    return path


def data(rows: list[Any], tokenizer: Any, **config: Any) -> TokenDataset:
    dataset = as_dataset(rows, tokenizer, DataConfig(**config), "rows")
    assert isinstance(dataset, TokenDataset)
    return dataset


def target_texts(rows: list[Any], tokenizer: Any, **config: Any) -> list[list[str]]:
    """The text of each span of targets, row by row."""
    texts = []
    for tokens, targets in data(rows, tokenizer, **config):
        spans = target_spans(targets, len(tokens))
        texts.append([tokenizer.decode(tokens[start:end]) for start, end in spans])
    return texts


@pytest.mark.parametrize(
    ("kind", "mask_prompt"),
    [(kind, mask) for kind in ROWS for mask in (False, True) if (kind, mask) != MASKED],
)
def test_rows_read_as_mlx_lm_reads_them(
    kind: str, mask_prompt: bool, tokenizer: Any
) -> None:
    import types

    from mlx_lm.tuner.datasets import CacheDataset, create_dataset

    rows = [ROWS[kind]] * 2
    config = types.SimpleNamespace(mask_prompt=mask_prompt)
    theirs = CacheDataset(create_dataset(rows, tokenizer, config))
    ours = data(rows, tokenizer, mask_prompt=mask_prompt)
    assert ours.kind == kind
    assert ours[1] == theirs[1]
    assert (ours[1][1] != 0) == mask_prompt


def test_features_can_have_other_names(tokenizer: Any) -> None:
    plain = data([ROWS["completions"]], tokenizer, mask_prompt=True)
    row = {"q": ROWS["completions"]["prompt"], "a": ROWS["completions"]["completion"]}
    named = data(
        [row], tokenizer, prompt_feature="q", completion_feature="a", mask_prompt=True
    )
    assert named[0] == plain[0]


def test_tools_reach_the_chat_template(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "jump"}}]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% if tools %}T{% endif %}" + template
    with_tools = data([{"messages": MESSAGES, "tools": tools}], tokenizer)[0]
    without = data([{"messages": MESSAGES}], tokenizer)[0]
    assert with_tools[0] == [*tokenizer.encode("T"), *without[0]]


def test_rows_of_tokens_are_accepted(tokenizer: Any) -> None:
    assert data([[1, 2, 3]], tokenizer)[0] == ([1, 2, 3], 0)
    assert data([([1, 2, 3], 2)], tokenizer)[0] == ([1, 2, 3], 2)


def test_rows_are_tokenized_once_and_on_first_use(tokenizer: Any) -> None:
    class Counting:
        eos_token_id = 2
        calls = 0

        def encode(self, text: str) -> list[int]:
            self.calls += 1
            return [5, 6]

    counting = Counting()
    rows = data([{"text": "a"}] * 5, counting)
    assert counting.calls == 1  # the first row tests the tokenizer
    assert [rows[3], rows[3]] == [([5, 6, 2], 0)] * 2
    assert counting.calls == 2


def test_prompt_ends_where_the_template_writes_it_differently(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}A: {{ messages[0].content }} think"
        "{% else %}A: {{ messages[0].content }}!{{ messages[1].content }}{% endif %}"
    )
    rows = data([ROWS["completions"]] * 2, tokenizer, mask_prompt=True)
    tokens, first = rows[0]
    assert isinstance(first, int)
    assert tokenizer.decode(tokens[first:]) == "!It jumps."
    assert rows[1] == rows[0]
    assert len(caplog.records) == 1


BAD_ROWS = {
    "not JSON": (
        "{'text': 1}",
        r"line 2: not JSON \(Expecting property name .* at character 2 of the line",
    ),
    "nested too deeply": ("[" * 100_000, r"line 2, .* nested too deeply"),
    "endless number": ('{"n": ' + "9" * 5000 + "}", r"line 2, .*4300 digits"),
    "no object": ([1, 2], r"line 2: expected a JSON object .* got a list"),
    "other keys": ({"txt": "a"}, r"line 2: expected the key 'text', .* found 'txt'"),
    "no text": ({"text": 5}, r"line 2: 'text' must be text, got int"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_bad_row_is_named_by_file_and_line(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    line, message = BAD_ROWS[name]
    write(tmp_path, "train", {"text": "fine"}, line)
    with pytest.raises(DoRAError, match=rf"train\.jsonl, {message}"):
        load_datasets(DataConfig(data=str(tmp_path)), tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "must be a list of messages, got str"),
        ({"messages": []}, "holds no message"),
        ({"messages": [{"content": "hi"}]}, r"\[0\]: .*'role' and .*; found 'content'"),
        ({"messages": ["hi"]}, r"\[0\]: .*'role' and .*; found 'hi'"),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            r"row 1: 'messages'\[0\]: unknown role 'usr'; .* \(did you mean 'user'",
        ),
        (
            {"messages": [{"from": "bot", "value": "a"}]},
            r"unknown role 'bot'; expected one of human, gpt, ",
        ),
        ({"messages": [{"from": "gpt"}]}, "expected the key 'value'; found 'from'"),
    ],
)
def test_a_bad_message_is_named(row: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DoRAError, match=message):
        data([ROWS["chat"], row], tokenizer)


def test_unknown_format_lists_expected_and_actual_keys(
    tokenizer: Any, tmp_path: Path
) -> None:
    write(tmp_path, "valid", {"question": "a", "answer": "b"})
    message = (
        r"valid\.jsonl, line 1: expected the columns 'prompt' and 'completion', or "
        r"'messages', or 'conversations', or 'instruction' and 'output', or 'text'; "
        r"found 'question', 'answer'\. Name yours, .*--prompt-feature"
    )
    with pytest.raises(DoRAError, match=message):
        load_datasets(DataConfig(data=str(tmp_path)), tokenizer)


def test_empty_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(DoRAError, match=r"train\.jsonl is empty"):
        load_datasets(DataConfig(data=str(tmp_path)), tokenizer)


def test_folder_without_data_and_unknown_folder_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match=r"holds no data: expected train\.jsonl, or"):
        load_datasets(DataConfig(data=str(tmp_path)), tokenizer)
    with pytest.raises(DoRAError, match="does not exist"):
        load_datasets(DataConfig(data=str(tmp_path / "a" / "b")), tokenizer)
    with pytest.raises(DoRAError, match="there is no folder or file nowhere"):
        load_datasets(DataConfig(data="nowhere"), tokenizer)


def test_missing_splits_are_none(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "train", ROWS["text"], "", ROWS["text"])
    loaded = load_datasets(DataConfig(data=str(tmp_path)), tokenizer)
    assert loaded["valid"] is loaded["test"] is None
    train = loaded["train"]
    assert train is not None
    assert len(train) == 2
    assert train.where(1).endswith("train.jsonl, line 3")


def test_mask_prompt_on_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DoRAError, match="mask_prompt needs completions or chat"):
        data([ROWS["text"]], tokenizer, mask_prompt=True)


def test_missing_chat_template_is_a_one_line_error(tokenizer: Any) -> None:
    tokenizer._tokenizer.chat_template = None
    with pytest.raises(DoRAError, match=r"chat template rejects this row") as info:
        data([ROWS["chat"]], tokenizer)
    assert "\n" not in str(info.value)


def test_hub_entries_are_joined(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    def load_dataset(path: str, split: str, **extra: Any) -> list[Any]:
        asked.append((path, split, extra))
        return [{"q": "a", "a": path}, {"q": "b", "a": path}]

    asked: list[Any] = []
    errors = types.SimpleNamespace(DatasetsError=RuntimeError)
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    features = {"prompt_feature": "q", "completion_feature": "a"}
    entries = [
        {"path": "x/one", "train_split": "train[:5]", "config": {"name": "c"}},
        {"path": "x/two"},
    ]
    config = DataConfig(hf_dataset=[{**entry, **features} for entry in entries])
    train = load_datasets(config, tokenizer, ("train",))["train"]
    assert asked == [
        ("x/one", "train[:5]", {"name": "c"}),
        ("x/two", "train[:80%]", {}),
    ]
    assert train is not None
    assert [train.answer(i) for i in range(4)] == ["x/one"] * 2 + ["x/two"] * 2


def test_where_without_lines_counts_rows() -> None:
    rows = Rows(values=[1], source="x/one (train)", config=DataConfig())
    assert rows.where(0) == "x/one (train), row 0"


TURNS = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "the lazy dog"},
    {"role": "user", "content": "what"},
]


def test_every_turn_of_the_assistant_is_a_target(tokenizer: Any) -> None:
    tokens, spans = data([{"messages": TURNS}], tokenizer, all_turns=True)[0]
    assert isinstance(spans, tuple)
    texts = [tokenizer.decode(tokens[start:end]) for start, end in spans]
    assert texts == ["jumps over<|im_end|>\n", "the lazy dog<|im_end|>\n"]
    rows = [{"messages": TURNS[:4]}]
    _, last = data(rows, tokenizer, mask_prompt=True)[0]
    tokens, spans = data(rows, tokenizer, all_turns=True)[0]
    assert isinstance(spans, tuple)
    assert spans[-1] == (last, len(tokens))


def test_an_answer_rendered_differently_later_counts_as_it_stands_in_the_row(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n"
        "{% else %}A:{% if loop.last %}(think){% endif %}{{ m.content }}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    texts = target_texts([{"messages": TURNS[:4]}], tokenizer, all_turns=True)
    assert texts == [["jumps over\n", "(think)the lazy dog\n"]]


def test_answers_that_the_template_leaves_out_are_counted_by_row(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n"
        "{% elif loop.last %}A:{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    rows = [{"messages": TURNS[:4]}, {"messages": TURNS[:2]}]
    dataset = data(rows, tokenizer, all_turns=True)
    assert target_texts(rows, tokenizer, all_turns=True) == [
        ["the lazy dog\n"],
        ["jumps over\n"],
    ]
    counts = RowCounts()
    assert [counts.add(dataset[index], 100) for index in range(2)] == [True, True]
    assert "in 1 of 2 rows the chat template does not show every" in str(
        counts.describe(100)
    )


def test_a_template_that_refuses_parts_of_a_row_leaves_the_answer_out(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = (
        "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    )
    example = data([{"messages": TURNS[:4]}], tokenizer, all_turns=True)[0]
    assert isinstance(example[1], IncompleteSpans)
    assert example[1] == ()


def test_turns_need_turns(tokenizer: Any) -> None:
    with pytest.raises(DoRAError, match="all_turns needs completions or chat"):
        data([ROWS["text"]], tokenizer, all_turns=True)
    masked = data([ROWS["completions"]], tokenizer, mask_prompt=True)
    assert data([ROWS["completions"]], tokenizer, all_turns=True)[0] == masked[0]
