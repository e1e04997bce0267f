"""The messages of a chat as a chat template takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dora.io.json import parse


def parsed_arguments(messages: Sequence[Any], where: str) -> list[Any]:
    """Return the messages with the arguments of tool calls as objects.

    OpenAI's format writes a call's arguments as JSON text. Chat templates apply
    ``tojson`` to them, which would quote the text a second time, so that a model would
    learn backslashes. mlx-lm's server parses the text before it applies the template;
    this function does the same for training. Nothing is changed in place.

    Args:
        messages: The messages of one chat.
        where: What an error names: the row.

    Raises:
        DoRAError: If the text is not JSON.
    """
    parsed = []
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, Sequence) and not isinstance(calls, str):
            place = f"{where}[{number}]"
            message = {**message, "tool_calls": [_call(call, place) for call in calls]}
        parsed.append(message)
    return parsed


def _call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str) or not arguments:
        return call
    value = parse(arguments, f"{where}, the text of a tool call's arguments,")
    return {**call, "function": {**function, "arguments": value}}


def missing_content(messages: Sequence[Any]) -> str:
    """Say which message has no content, for a template that does not take it."""
    for number, message in enumerate(messages):
        if message.get("content") is None:
            calls = "tool calls and " if message.get("tool_calls") else ""
            return (
                f" (messages[{number}], of role {message.get('role')!r}, has {calls}no "
                "content)"
            )
    return ""
