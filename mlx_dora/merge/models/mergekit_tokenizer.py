"""Reads the tokenizer settings of a mergekit file."""

from typing import Any

from mlx_dora.errors import DoRAError
from mlx_dora.merge.models.mergekit_layout import (
    Settings,
    mapping,
    refuse_unknown,
    text_of,
)
from mlx_dora.merge.models.tokenizer_plan import TokenizerPlan, TokenRule


def read_tokenizer(top: Settings) -> TokenizerPlan | None:
    """Read ``tokenizer`` or ``tokenizer_source``; None if the file has neither.

    Raises:
        DoRAError: If both are given, or a part has the wrong type.
    """
    if top.get("tokenizer") is None:
        source = text_of("tokenizer_source", top)
        return None if source is None else TokenizerPlan(source=source)
    if top.get("tokenizer_source") is not None:
        raise DoRAError("give either tokenizer_source or tokenizer, not both.")
    settings = mapping("tokenizer", top["tokenizer"])
    refuse_unknown("tokenizer", settings, ("source", "tokens", "pad_to_multiple_of"))
    tokens = settings.get("tokens")
    rules = {} if tokens is None else mapping("tokenizer: tokens", tokens)
    multiple = settings.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise DoRAError(
            "tokenizer: pad_to_multiple_of must be a whole number of at least 1, got "
            f"{multiple!r:.60}."
        )
    return TokenizerPlan(
        source=text_of("source", settings) or "union",
        rules={str(token): _rule(str(token), rule) for token, rule in rules.items()},
        multiple=multiple,
    )


def _rule(token: str, content: Any) -> TokenRule:
    where = f"tokenizer: tokens: {token}"
    rule = mapping(where, content)
    refuse_unknown(where, rule, ("source", "force"))
    force, source = rule.get("force", False), rule.get("source")
    if not isinstance(force, bool):
        raise DoRAError(f"{where}: force must be true or false, got {force!r:.60}.")
    if isinstance(source, str) and source:
        return TokenRule(kind="model", model=source, force=force)
    if source is None:
        raise DoRAError(f"{where} needs a source: a model, or a mapping with kind.")
    entry = mapping(f"{where}: source", source)
    kind = entry.get("kind")
    if kind == "zero":
        refuse_unknown(f"{where}: source", entry, ("kind",))
        return TokenRule(kind="zero", force=force)
    refuse_unknown(f"{where}: source", entry, ("kind", "model", "token", "token_id"))
    model, text, number = (entry.get(key) for key in ("model", "token", "token_id"))
    is_text, is_number = isinstance(text, str), type(number) is int and number >= 0
    has_one = (text is None) != (number is None) and (is_text or is_number)
    if kind != "model_token" or not isinstance(model, str) or not has_one:
        raise DoRAError(
            f"{where}: source must be a model, kind: zero, or kind: model_token with "
            f"model and token or token_id, got {dict(entry)!r:.80}."
        )
    chosen = text if is_text else number
    return TokenRule(kind="model_token", model=model, token=chosen, force=force)
