"""Data problems reported to other projects; each test name ends with the report.

Targets are compared with the token ids of the expected text.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.data.batches import batches_once
from mlx_dora.data.config import DataConfig
from mlx_dora.data.counts import RowCounts
from mlx_dora.data.loading import as_dataset, load_datasets
from mlx_dora.data.targets import target_spans
from mlx_dora.errors import DoRAError

USER = {"role": "user", "content": "What does the fox do?"}
ANSWER = {"role": "assistant", "content": "It jumps."}
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- endif %}"
)
CALLS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{{- m.content or '' }}{%- for c in m.tool_calls or [] %}"
    "{{- '<call>' + c.function.name + ' ' }}{{- ARGUMENTS }}{{- '</call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tiny_model_folder)


def targets(rows: list[Any], tokenizer: Any, **config: Any) -> list[list[list[int]]]:
    """Token ids of each span of targets, row by row."""
    spans_by_row = []
    for tokens, marks in as_dataset(rows, tokenizer, DataConfig(**config), "rows"):
        spans = target_spans(marks, len(tokens))
        spans_by_row.append([tokens[start:end] for start, end in spans])
    return spans_by_row


def ids(tokenizer: Any, *texts: str) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "c", "type": "function", "function": function}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


def write(folder: Path, content: bytes) -> DataConfig:
    (folder / "train.jsonl").write_bytes(content)
    return DataConfig(data=str(folder))


def test_a_tokenizer_without_an_end_token_trains_without__datatrove_489(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "the quick fox"}]
    with_end = as_dataset(rows, tokenizer, DataConfig(), "rows")[0][0]
    tokenizer._tokenizer.eos_token = None
    tokens = as_dataset(rows, tokenizer, DataConfig(), "rows")[0][0]
    assert tokens == ids(tokenizer, "the quick fox")[0] == with_end[:-1]
    assert "rows: the tokenizer has no end-of-text token" in caplog.text


@pytest.mark.parametrize(
    "line", [b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b"[" * 100_000]
)
def test_a_line_that_breaks_the_parser_is_named__helm_1381(
    line: bytes, tokenizer: Any, tmp_path: Path
) -> None:
    config = write(tmp_path, b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DoRAError, match=r"train\.jsonl, line 2, is not"):
        load_datasets(config, tokenizer)


@pytest.mark.parametrize("role", ["user", "tool", "system"])
def test_mask_prompt_skips_rows_not_ended_by_the_assistant__prime_rl_974(
    role: str, tokenizer: Any
) -> None:
    after = {"role": role, "content": "the lazy dog"}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, after]}]
    answer = ids(tokenizer, "It jumps.<|im_end|>\n")
    assert targets(rows, tokenizer, mask_prompt=True) == [answer, []]
    assert targets(rows, tokenizer, all_turns=True) == [answer, answer]
    counts = RowCounts()
    dataset = as_dataset(rows, tokenizer, DataConfig(mask_prompt=True), "rows")
    (batch,) = batches_once(dataset, 2, 100, counts=counts)
    assert batch[0].shape[0] == 1
    assert (counts.skipped, counts.unanswered) == (1, 1)
    assert "1 of 2 rows have no answer to learn" in str(counts.describe(100))


def test_data_without_any_answer_says_so__torchtune_2261(tokenizer: Any) -> None:
    config = DataConfig(mask_prompt=True)
    dataset = as_dataset([{"messages": [USER]}] * 3, tokenizer, config, "rows")
    with pytest.raises(DoRAError, match="no row has an answer to learn"):
        list(batches_once(dataset, 2, 100))


def test_arguments_of_a_tool_call_may_be_text__mlx_examples_1053(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = CALLS.replace(
        "ARGUMENTS", "c.function.arguments | tojson"
    )
    rows = [calling('{"city": "Rome"}'), calling({"city": "Rome"})]
    call = ids(tokenizer, '<call>weather {"city": "Rome"}</call><|im_end|>\n')
    for config in ({"mask_prompt": True}, {"all_turns": True}):
        assert targets(rows, tokenizer, **config) == [call, call]
    (message,) = rows[0]["messages"][1:]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'


def test_a_template_that_accepts_only_text_gets_text__mlx_examples_1053(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = CALLS.replace("ARGUMENTS", "'' + c.function.arguments")
    rows = [calling('{"city":  "Rome"}')] * 2
    call = ids(tokenizer, '<call>weather {"city":  "Rome"}</call><|im_end|>\n')
    assert targets(rows, tokenizer, mask_prompt=True) == [call, call]


def test_arguments_that_are_not_json_are_named__mlx_examples_1053(
    tokenizer: Any,
) -> None:
    with pytest.raises(DoRAError, match=r"row 1: 'messages'\[1\].* arguments.*JSON"):
        targets([calling("{}"), calling("{city")], tokenizer)


def test_every_turn_counts_where_thoughts_are_dropped_later__slime_330(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = THINKING
    turns = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(3)
        for role in ("user", "assistant")
    ]
    thought = "<think>\n\n</think>\n\n"
    first, second, third = (f"assistant {number}<|im_end|>\n" for number in range(3))
    rows = [{"messages": turns}, {"messages": turns[:4]}, {"messages": turns[:5]}]
    assert targets(rows, tokenizer, all_turns=True) == [
        ids(tokenizer, first, second, thought + third),
        ids(tokenizer, first, thought + second),
        ids(tokenizer, first, second),
    ]


def test_an_empty_answer_and_an_answer_with_thoughts_are_located__nemo_16284(
    tokenizer: Any,
) -> None:
    content = "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content"
    tokenizer.chat_template = THINKING.replace("m.content +", f"({content}) +")
    turns = [
        *(USER, {"role": "assistant", "content": "<think>hm</think>so"}),
        *(USER, {"role": "assistant", "content": ""}, USER, ANSWER),
    ]
    end = "<|im_end|>\n"
    last = f"<think>\n\n</think>\n\nIt jumps.{end}"
    spans = targets([{"messages": turns}], tokenizer, all_turns=True)
    assert spans == [ids(tokenizer, f"so{end}", end, last)]


def test_a_chat_may_begin_with_the_assistant(tokenizer: Any) -> None:
    rows = [{"messages": [ANSWER, USER, ANSWER]}, {"messages": [ANSWER]}]
    (answer,) = ids(tokenizer, "It jumps.<|im_end|>\n")
    assert targets(rows, tokenizer, all_turns=True) == [[answer, answer], [answer]]
    tokenizer.chat_template = "<|endoftext|>{{ 'Be good.' }}" + tokenizer.chat_template
    assert targets(rows, tokenizer, all_turns=True) == [[answer, answer], [answer]]
    assert targets(rows[:1], tokenizer, mask_prompt=True) == [[answer]]


def test_a_lone_answer_has_no_prompt_to_mask__mlx_examples_1243(
    tokenizer: Any,
) -> None:
    with pytest.raises(DoRAError, match=r"row 1: 'messages' .* there is no prompt"):
        targets(
            [{"messages": m} for m in ([USER, ANSWER], [ANSWER])],
            tokenizer,
            mask_prompt=True,
        )


ROW = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_and_its_entries_are_named(
    indent: int | None, tokenizer: Any, tmp_path: Path
) -> None:
    config = write(tmp_path, json.dumps([ROW, ROW], indent=indent).encode())
    train = load_datasets(config, tokenizer)["train"]
    assert train is not None
    assert len(train) == 2
    assert train.where(1).endswith("train.jsonl, entry 2")
    config = write(tmp_path, json.dumps([ROW, 5], indent=indent).encode())
    with pytest.raises(DoRAError, match=r"entry 2: expected a JSON object .* int"):
        load_datasets(config, tokenizer)


def test_an_object_over_several_lines_says_how_to_fix_it__mlx_examples_630(
    tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError, match=r"line 1: a JSON object spread .*jq -c \. tr"):
        load_datasets(write(tmp_path, json.dumps(ROW, indent=1).encode()), tokenizer)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ({"text": "fox \ud83d jumps"}, "character 5 of text"),
        ({"prompt": "a", "completion": "\udc00"}, "character 1 of completion"),
        (
            {"messages": [USER, {"role": "assistant", "content": "ab\ud83d"}]},
            r"character 3 of messages\[1\].content",
        ),
    ],
)
def test_half_a_surrogate_pair_is_named_by_place__tiktoken_82(
    row: dict[str, Any], place: str, tokenizer: Any, tmp_path: Path
) -> None:
    config = write(tmp_path, json.dumps(row).encode())
    with pytest.raises(DoRAError, match=rf"line 1: {place} is .* surrogate"):
        load_datasets(config, tokenizer)


def test_a_whole_surrogate_pair_is_one_character__tiktoken_82(
    tokenizer: Any, tmp_path: Path
) -> None:
    config = write(tmp_path, b'{"text": "\\ud83e\\udd8a"}')
    dataset = load_datasets(config, tokenizer)["train"]
    assert dataset is not None
    assert tokenizer.decode(dataset[0][0][:-1]) == "\N{FOX FACE}"


def test_a_message_without_content_is_named__mlx_examples_1243(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '' }}{% endfor %}"
    with pytest.raises(DoRAError, match=r"messages\[1\].* has tool calls and no cont"):
        targets([calling({})], tokenizer)
