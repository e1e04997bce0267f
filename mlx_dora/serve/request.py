"""Checks of a request before mlx-lm's server sees it.

mlx-lm checks some of a request's values. Others reach its generation thread, where an
invalid value ends the thread, and with it all later requests. Therefore every value is
checked here.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from mlx_dora.errors import DoRAError

GREATEST = 2**31 - 1

_WHOLE = {  # name -> minimum and maximum
    "max_tokens": (1, GREATEST),
    "max_completion_tokens": (1, GREATEST),
    "num_draft_tokens": (0, 1000),
    "top_k": (0, GREATEST),
    "top_logprobs": (-1, 11),
    "repetition_context_size": (0, GREATEST),
    "presence_context_size": (0, GREATEST),
    "frequency_context_size": (0, GREATEST),
    "seed": (0, 2**64 - 1),
}
_REAL = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "repetition_penalty": (0.0, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}
_YES_OR_NO = ("stream", "logprobs")
_NAMES = ("model", "adapters", "draft_model")
_RESERVED = {  # parameters of apply_chat_template that only the server sets
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


def check_request(body: Any, *, is_chat: bool) -> dict[str, Any]:
    """Check the body of a request for a completion.

    Args:
        body: The parsed body.
        is_chat: Whether the body holds ``messages``; otherwise it holds a ``prompt``.

    Returns:
        The body without null values (except ``draft_model``, where null means no
        draft model), and with the defaults that mlx-lm assumes.

    Raises:
        DoRAError: Names the key and the allowed values.
    """
    _require(isinstance(body, dict), "the request must be a JSON object")
    body = {k: v for k, v in body.items() if v is not None or k == "draft_model"}
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DoRAError(
            "the request holds half of a surrogate pair: not valid Unicode."
        ) from None
    for name, check in _CHECKS.items():
        if name in body:
            check(body[name], name)
    if is_chat:
        _require("messages" in body, "the request has no messages")
        _messages(body["messages"])
    else:
        is_text = isinstance(body.get("prompt"), str) and body["prompt"] != ""
        _require(is_text, "prompt must be text of at least one character")
    if "stream_options" in body:
        body["stream_options"] = {"include_usage": False, **body["stream_options"]}
    return body


def check_for_vocabulary(
    size: int, *, logit_bias: dict[int, float] | None, top_k: int, top_logprobs: int
) -> None:
    """Check the values that depend on the model's vocabulary size.

    Raises:
        DoRAError: Names the value that is too large.
    """
    for token in logit_bias or {}:
        _require(
            0 <= token < size,
            f"logit_bias names the token {token}; the model has 0 to {size - 1}",
        )
    _require(top_k < size, f"top_k must be less than the {size} tokens of the model")
    _require(top_logprobs <= size, f"top_logprobs must be at most {size}")


def check_limits(body: dict[str, Any], max_new_tokens: int) -> None:
    """Check what a server of several adapters does not offer, or only up to a limit.

    Raises:
        DoRAError: Names the key and the allowed values.
    """
    for name in ("max_tokens", "max_completion_tokens"):
        _require(
            body.get(name, 1) <= max_new_tokens,
            f"{name} must be at most {max_new_tokens} (--max-new-tokens)",
        )
    _require(body.get("n", 1) == 1, "n must be 1: a request gets one answer")
    draft = body.get("draft_model", "default_model")
    _require(draft in (None, "default_model"), "this server has no draft model")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DoRAError(f"{message}.")


def _number(value: Any, name: str) -> None:
    whole = name in _WHOLE
    least, greatest = (_WHOLE if whole else _REAL)[name]
    kinds = int if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    noun = "whole number" if whole else "number"
    _require(
        is_number and least <= value <= greatest,  # False for NaN
        f"{name} must be a {noun} from {least} to {greatest}",
    )


def _yes_or_no(value: Any, name: str) -> None:
    _require(isinstance(value, bool), f"{name} must be true or false")


def _text(value: Any, name: str) -> None:
    _require(isinstance(value, str) and value != "", f"{name} must be text")


def _optional_text(value: Any, name: str) -> None:
    if value is not None:
        _text(value, name)


def _stop(value: Any, name: str) -> None:
    words = [value] if isinstance(value, str) and value else value
    words = [] if value == "" else words
    _require(
        isinstance(words, list) and all(isinstance(w, str) and w for w in words),
        f"{name} must be text or a list of texts, none of them empty",
    )


def _logit_bias(value: Any, name: str) -> None:
    _require(isinstance(value, dict), f"{name} must be an object of token to number")
    for token, bias in value.items():
        is_token = token.isascii() and token.isdecimal() and len(token) < 10
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        _require(
            is_token and is_number and math.isfinite(bias) and abs(bias) <= 1e6,
            f"{name} must be an object of token numbers to numbers from -1e6 to 1e6",
        )


def _stream_options(value: Any, name: str) -> None:
    is_valid = isinstance(value, dict)
    is_valid = is_valid and isinstance(value.get("include_usage", False), bool)
    _require(is_valid, f"{name} must be an object such as {{'include_usage': true}}")


def _template_arguments(value: Any, name: str) -> None:
    _require(isinstance(value, dict), f"{name} must be an object")
    taken = sorted(_RESERVED & set(value))
    _require(not taken, f"{name} must not set {', '.join(taken)}")


def _tools(value: Any, name: str) -> None:
    is_list = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    _require(is_list, f"{name} must be a list of objects")


def _role_mapping(value: Any, name: str) -> None:
    is_mapping = isinstance(value, dict)
    is_mapping = is_mapping and all(isinstance(v, str) for v in value.values())
    _require(is_mapping, f"{name} must be an object of role to text")


def _messages(messages: Any) -> None:
    _require(
        isinstance(messages, list) and len(messages) > 0,
        "messages must be a list of at least one message",
    )
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        is_message = isinstance(message, dict) and isinstance(message.get("role"), str)
        _require(is_message, f"{place} must be an object with the text 'role'")
        _content(message.get("content"), place)
        _tool_calls(message.get("tool_calls"), place)


def _content(content: Any, place: str) -> None:
    if content is None or isinstance(content, str):
        return
    _require(
        isinstance(content, list)
        and all(isinstance(part, dict) for part in content)
        and all(isinstance(part.get("type"), str) for part in content)
        and all(isinstance(p.get("text"), str) for p in content if p["type"] == "text"),
        f"{place}.content must be text or a list of parts such as "
        "{'type': 'text', 'text': '...'}",
    )


def _tool_calls(calls: Any, place: str) -> None:
    _require(
        calls is None
        or (
            isinstance(calls, list)
            and all(isinstance(call, dict) for call in calls)
            and all(isinstance(call.get("function", {}), dict) for call in calls)
        ),
        f"{place}.tool_calls must be a list of objects with the object 'function'",
    )


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    **dict.fromkeys([*_WHOLE, *_REAL], _number),
    **dict.fromkeys(_YES_OR_NO, _yes_or_no),
    "model": _text,
    "adapters": _text,
    "draft_model": _optional_text,
    "stop": _stop,
    "logit_bias": _logit_bias,
    "stream_options": _stream_options,
    "chat_template_kwargs": _template_arguments,
    "tools": _tools,
    "role_mapping": _role_mapping,
}
