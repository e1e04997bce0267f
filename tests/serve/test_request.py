from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.request import check_for_vocabulary, check_request

MESSAGE = {"role": "user", "content": "fox?"}
WRONG: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.5, "5", True, 2**31],
    "temperature": [-1, "hot", float("nan"), float("inf"), 10**400, [0.5]],
    "top_p": [1.5, -0.1],
    "top_k": [-1, 1.0],
    "top_logprobs": [12, -2],
    "seed": [-1, 2**64, "1"],
    "stream": [1, "yes"],
    "model": ["", 5, ["a"]],
    "adapters": ["", 5, {}],
    "draft_model": ["", 5],
    "stop": [5, [5], [["a"]], ["a", ""], {"a": 1}],
    "logit_bias": [
        [1],
        {"a": 1},
        {"-1": 1},
        {"1": "2"},
        {"1": None},
        {"1": float("inf")},
        {"9999999999": 1},
        {"\u00b2": 1},
    ],
    "stream_options": [[1], {"include_usage": 1}],
    "chat_template_kwargs": [5, {"chat_template": "x"}, {"tokenize": False}],
    "tools": [{}, ["a"]],
    "role_mapping": ["a", {"user": 5}],
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_value_is_refused_by_name(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(DoRAError, match=name):
            check_request({"prompt": "fox", name: value}, is_chat=False)


@pytest.mark.parametrize("prompt", ["", 5, [], ["a"], [1, 2], {"a": 1}, None])
def test_a_prompt_is_text(prompt: Any) -> None:
    with pytest.raises(DoRAError, match="prompt must be text"):
        check_request({"prompt": prompt}, is_chat=False)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ("hi", "messages must"),
        ([], "messages must"),
        (["hi"], r"messages\[0\]"),
        ([MESSAGE, {"content": "a"}], r"messages\[1\]"),
        ([{"role": 5, "content": "a"}], r"messages\[0\]"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content"),
        ([{"role": "assistant", "tool_calls": "a"}], r"messages\[0\].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": 5}]}], "tool_calls"),
    ],
)
def test_a_wrong_message_is_named(messages: Any, place: str) -> None:
    with pytest.raises(DoRAError, match=place):
        check_request({"messages": messages}, is_chat=True)


@pytest.mark.parametrize("body", [[], "a", 5, None])
def test_the_body_is_an_object(body: Any) -> None:
    with pytest.raises(DoRAError, match="must be a JSON object"):
        check_request(body, is_chat=False)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DoRAError, match="surrogate"):
        check_request({"prompt": "a", "stop": ["\ud83d"]}, is_chat=False)


def test_null_means_absent_but_for_the_draft_model() -> None:
    body = {"prompt": "a", "temperature": None, "stop": None, "draft_model": None}
    assert check_request(body, is_chat=False) == {"prompt": "a", "draft_model": None}


def test_what_clients_send_passes() -> None:
    body = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be good."}]},
            MESSAGE,
            {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
        ],
        "model": "default_model",
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 1,
        "stop": ["a", "b"],
        "logit_bias": {"5": -100, "0": 1.5},
        "seed": 2**64 - 1,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": True,
        "user": "of no meaning here",
    }
    assert check_request(dict(body), is_chat=True) == body


def test_stream_options_get_their_default() -> None:
    body = {"prompt": "a", "stream_options": {"other": 1}}
    checked = check_request(body, is_chat=False)
    assert checked["stream_options"] == {"include_usage": False, "other": 1}


@pytest.mark.parametrize(
    ("bias", "top_k", "top_logprobs", "message"),
    [
        ({320: 1.0}, 0, -1, "token 320; the model has 0 to 319"),
        ({-1: 1.0}, 0, -1, "token -1"),
        (None, 320, -1, "top_k must be less than the 320"),
        (None, 0, 321, "top_logprobs"),
    ],
)
def test_values_beyond_the_vocabulary_are_refused(
    bias: Any, top_k: int, top_logprobs: int, message: str
) -> None:
    allowed = {"logit_bias": {319: 1.0}, "top_k": 319, "top_logprobs": 11}
    check_for_vocabulary(320, **allowed)
    with pytest.raises(DoRAError, match=message):
        check_for_vocabulary(
            320, logit_bias=bias, top_k=top_k, top_logprobs=top_logprobs
        )
