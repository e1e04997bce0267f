import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest


def test_tiny_folder_holds_the_tiny_model(
    tiny_model: nn.Module, tiny_model_folder: Path
) -> None:
    from mlx_lm import load

    loaded = load(str(tiny_model_folder))[0]
    tokens = mx.array([[1, 5, 9]])
    assert mx.array_equal(loaded(tokens), tiny_model(tokens))


@pytest.mark.parametrize("bits", [None, 4])
def test_tiny_folder_generates_through_its_chat_template(
    make_tiny_folder: Callable[..., Path], bits: int | None
) -> None:
    from mlx_lm import generate, load

    model, tokenizer = load(str(make_tiny_folder(bits=bits)))[:2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a fox?"}], add_generation_prompt=True
    )
    assert prompt[0] == 1  # <|im_start|>
    assert isinstance(generate(model, tokenizer, prompt, max_tokens=4), str)


def test_pytests_cache_is_used_where_it_may_be_missing() -> None:
    """``-p no:cacheprovider`` leaves pytest without it: use `kept_folder`."""
    here = Path(__file__).parent
    users = [
        path.relative_to(here).as_posix()
        for path in here.rglob("*.py")
        if re.search(r"config\.cache\b|cache\.mkdir", path.read_text(encoding="utf-8"))
    ]
    assert users == ["conftest.py"]
