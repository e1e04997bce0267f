"""Prompts as examples, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import load_datasets
from mlx_dora.data.prompts import PromptDataset, digest_columns
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from tests.conftest import CHAT_TEMPLATE


@pytest.fixture
def prompts(tiny_model_folder: Path) -> Callable[..., PromptDataset]:
    tokenizer = load_tokenizer(str(tiny_model_folder))

    def make(*values: Any, **config: Any) -> PromptDataset:
        rows = Rows(values=values, source="here", config=DataConfig(**config))
        return PromptDataset(rows, tokenizer)

    make.tokenizer = tokenizer  # pyright: ignore[reportFunctionMemberAccess]
    return make


def test_text_stands_as_it_is(prompts: Any) -> None:
    data = prompts({"prompt": "the dog", "answer": 3, "level": "a"})
    tokens, start = data[0]
    assert prompts.tokenizer.decode(tokens[:start]) == "the dog"
    assert tokens[start:] == [prompts.tokenizer.eos_token_id]
    assert data.prompt(0).columns == {"answer": 3, "level": "a"}
    assert not data.prompt(0).is_chat
    assert data.reading == "prompts of text (prompt, answer, level)"


def test_messages_go_through_the_template(prompts: Any) -> None:
    assert "add_generation_prompt" in CHAT_TEMPLATE
    messages = [{"role": "user", "content": "the dog"}]
    for value in (messages, '[{"role": "user", "content": "the dog"}]'):
        data = prompts({"prompt": value})
        tokens, start = data[0]
        text = prompts.tokenizer.decode(tokens[:start])
        assert text == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
        assert data.prompt(0).value == messages
        assert data.prompt(0).is_chat


def test_the_column_of_the_prompt_may_have_another_name(prompts: Any) -> None:
    data = prompts({"question": "the", "prompt": "no"}, prompt_feature="question")
    assert data.prompt(0).value == "the"
    assert data.prompt(0).columns == {"prompt": "no"}


def test_changed_columns_change_the_digest(prompts: Any) -> None:
    one, same, other = (
        digest_columns(prompts({"prompt": "the", "answer": value}))
        for value in (1, 1, 2)
    )
    assert one == same != other


def test_an_unpaired_surrogate_is_refused(prompts: Any) -> None:
    with pytest.raises(DoRAError, match="half of a surrogate pair"):
        prompts({"prompt": "a\ud800"})


def test_several_files_are_joined(tiny_model_folder: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        name = tmp_path / "data" / f"train-0000{number}-of-00002.jsonl"
        name.parent.mkdir(exist_ok=True)
        name.write_text(f'{{"prompt": "the", "answer": {number}}}\n')
    tokenizer = load_tokenizer(str(tiny_model_folder))
    config = DataConfig(data=str(tmp_path / "data"), valid_share=0)
    data = load_datasets(config, tokenizer, ["train"], PromptDataset)["train"]
    assert [data.prompt(index).columns["answer"] for index in range(2)] == [0, 1]
