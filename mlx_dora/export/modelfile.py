"""Ollama's Modelfile: base, adapter, chat template and stop tokens.

Ollama has templates of its own language. This one is derived from what the model's own
template renders for short conversations, and left out where that is not the sum of one
text per message (Ollama then uses the template of the base).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dora.adapters.hosting import load_tokenizer
from mlx_dora.errors import DoRAError

_SYSTEM, _USER, _ANSWER, _NEXT = "~S~", "~U~", "~A~", "~N~"


@dataclass(frozen=True, kw_only=True)
class Modelfile:
    """The text of a Modelfile, and whether it has a template."""

    content: str
    has_template: bool


@dataclass(frozen=True, kw_only=True)
class ChatPieces:
    """The text around each message in a model's chat template.

    Attributes:
        system: Text before and after the system message.
        user: Text before and after the user's message.
        answer: Text before and after the model's answer.
        default: Text at the start of a conversation without a system message.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]
    default: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return the prompt for messages, ready for the model's next answer."""
        pieces = {"system": self.system, "user": self.user, "assistant": self.answer}
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, after = pieces[message["role"]]
            text += before + message["content"] + after
        return text + self.answer[0]

    def go_template(self) -> str:
        """Return Ollama's template for these pieces."""
        start = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}"
        roles = (
            ("system", self.system),
            ("user", self.user),
            ("assistant", self.answer),
        )
        cases = "".join(
            f'{{{{ {"else " * bool(number)}if eq .Role "{role}" }}}}'
            f"{before}{{{{ .Content }}}}{after}"
            for number, (role, (before, after)) in enumerate(roles)
        )
        return (
            (start if self.default else "")
            + f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}"
            + self.answer[0]
        )


def modelfile(
    model_folder: str | Path, base: str, *, adapter: str | None = None
) -> Modelfile:
    """Return the Modelfile for a base, with the template of an MLX model.

    Args:
        model_folder: The model whose tokenizer gives template and stop tokens.
        base: What to build from: a GGUF file or a model of Ollama.
        adapter: Path of a GGUF adapter, relative to the Modelfile.

    Raises:
        DoRAError: If a name holds a line break.
    """
    if "\n" in base or "\n" in (adapter or ""):
        raise DoRAError(f"a name in a Modelfile must be one line, got {base!r}.")
    tokenizer = load_tokenizer(model_folder)
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    pieces = chat_pieces(tokenizer)
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
    else:
        lines.append("# No TEMPLATE: Ollama uses the one of the base.")
    ends = sorted(getattr(tokenizer, "eos_token_ids", None) or ())
    for text in dict.fromkeys(tokenizer.decode([end]) for end in ends):
        if text and '"' not in text and "\n" not in text:
            lines.append(f'PARAMETER stop "{text}"')
    return Modelfile(content="\n".join(lines) + "\n", has_template=pieces is not None)


def chat_pieces(tokenizer: Any) -> ChatPieces | None:
    """Return the text around each message; None if a template is not such a sum."""
    try:
        pieces = _derived(tokenizer)
    except (ValueError, _NoTemplateError):
        return None
    texts = (pieces.default, *pieces.system, *pieces.user, *pieces.answer)
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    for messages in _TRIALS:
        if _rendered(tokenizer, messages) != pieces.render(messages):
            return None
    return pieces


class _NoTemplateError(Exception):
    """The tokenizer has no chat template, or it refuses a conversation."""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_TRIALS = (
    [_message("user", "one")],
    [_message("system", "be brief"), _message("user", "one")],
    [
        _message("system", "be brief"),
        _message("user", "one"),
        _message("assistant", "two"),
        _message("user", "three"),
    ],
    [_message("user", "one"), _message("assistant", "two"), _message("user", "three")],
)


def _derived(tokenizer: Any) -> ChatPieces:
    user = _message("user", _USER)
    prompt = _rendered(tokenizer, [user])
    start, end = prompt.split(_USER)
    talk = [user, _message("assistant", _ANSWER), _message("user", _NEXT)]
    whole = _rendered(tokenizer, talk)
    _, between, after_answer, last = _cut(whole, _USER, _ANSWER, _NEXT)
    plain = _rendered(tokenizer, [user], prompts=False)
    user_after = plain.split(_USER)[1]
    if not end.startswith(user_after) or last != end:
        raise ValueError
    answer_before = end[len(user_after) :]
    if between != end:
        raise ValueError
    # The text after an answer and before the next question: find where it divides.
    stored = _rendered(tokenizer, talk[:2], prompts=False)
    answer_after = stored.split(_ANSWER)[1]
    if not after_answer.startswith(answer_after):
        raise ValueError
    user_before = after_answer[len(answer_after) :]
    if not start.endswith(user_before):
        raise ValueError
    default = start[: len(start) - len(user_before)] if user_before else start
    system = _rendered(tokenizer, [_message("system", _SYSTEM), user])
    system_before, middle, _ = _cut(system, _SYSTEM, _USER)
    if not middle.endswith(user_before):
        raise ValueError
    system_after = middle[: len(middle) - len(user_before)]
    return ChatPieces(
        system=(system_before, system_after),
        user=(user_before, user_after),
        answer=(answer_before, answer_after),
        default=default,
    )


def _cut(text: str, *marks: str) -> list[str]:
    """Split a text at marks that stand in it once each, in this order."""
    parts = []
    for mark in marks:
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def _rendered(
    tokenizer: Any, messages: list[dict[str, str]], prompts: bool = True
) -> str:
    """Render messages, without a start token that Ollama adds itself."""
    if not getattr(tokenizer, "has_chat_template", False):
        raise _NoTemplateError
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompts
        )
    except TemplateError as error:
        raise _NoTemplateError from error
    is_added = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if is_added else text
