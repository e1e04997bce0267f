from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import as_dataset
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.generation import generate_samples, sample_prompts


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(tiny_model_folder)


def test_prompts_end_where_the_answer_starts(tokenizer: Any) -> None:
    rows = [{"prompt": f"fox {i}", "completion": f"jumps {i}"} for i in range(9)]
    data = as_dataset(rows, tokenizer, DataConfig(), "rows")
    prompts = sample_prompts(data, tokenizer, 3)
    assert [one.expected for one in prompts] == ["jumps 0", "jumps 3", "jumps 6"]
    assert prompts[1].text.endswith("fox 3<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompts[1].text) == prompts[1].tokens


def test_plain_text_is_cut(tokenizer: Any) -> None:
    data = as_dataset([{"text": "the fox " * 40}], tokenizer, DataConfig(), "rows")
    (prompt,) = sample_prompts(data, tokenizer, 5)
    assert len(prompt.tokens) == 32
    assert ("the fox " * 40).startswith(prompt.text + prompt.expected)


def test_generation_is_greedy_and_restores_the_mode(
    tiny_model: nn.Module, tokenizer: Any
) -> None:
    rows = [{"prompt": "fox", "completion": "jumps"}]
    data = as_dataset(rows, tokenizer, DataConfig(), "rows")
    prompts = sample_prompts(data, tokenizer, 1)
    tiny_model.train()
    (text,) = generate_samples(tiny_model, tokenizer, prompts, max_tokens=5)
    assert tiny_model.training
    tokens = list(prompts[0].tokens)
    for _ in range(5):
        tokens.append(int(mx.argmax(tiny_model(mx.array([tokens]))[0, -1])))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    assert text == tokenizer.decode(tokens[len(prompts[0].tokens) :]).removesuffix(
        "<|im_end|>"
    )


def test_a_negative_number_of_samples_is_refused(tokenizer: Any) -> None:
    data = as_dataset([{"text": "fox"}], tokenizer, DataConfig(), "rows")
    with pytest.raises(DoRAError, match="must not be negative, got -1"):
        sample_prompts(data, tokenizer, -1)
