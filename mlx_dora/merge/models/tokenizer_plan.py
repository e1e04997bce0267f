"""The tokenizer that a merge asks for, and the rules for single tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """Where the embedding of a token comes from in models that lack it.

    Attributes:
        kind: ``"zero"``, ``"model"`` (the same token of `model`), or ``"model_token"``
            (another token of `model`).
        model: The model.
        token: The other token, as text or as its id.
        force: Whether models that have the token take this embedding too.
    """

    kind: str
    model: str | None = None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerPlan:
    """The output's tokenizer.

    Attributes:
        source: ``"base"``, ``"union"``, or a model.
        rules: Rules for single tokens; tokens that the source lacks are added.
        multiple: The embeddings get a multiple of this many rows.
    """

    source: str
    rules: Mapping[str, TokenRule] = field(default_factory=dict)
    multiple: int | None = None

    @property
    def model(self) -> str | None:
        """The model that the file names as the source, or None."""
        return None if self.source in ("base", "union") else self.source
