"""Compares a fused model with the unfused model on generated text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.hosting import load
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.agreement import Agreement, compare_probe, take_probe
from mlx_dora.evaluate.tolerance import FuseTolerance
from mlx_dora.fuse.model import REST_NAME

PROMPTS = (
    "The capital of France is Paris, and its longest river is",
    "Question: What does a hash table do, and why is looking things up fast?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "Three things to keep in mind when writing a letter are",
)
"""Default prompts."""


@dataclass(frozen=True, kw_only=True)
class FuseVerification:
    """Differences between a fused and an unfused model.

    Args:
        agreement: Agreement on the prompts and the unfused model's greedy
            continuations.
        tolerance: Largest allowed differences.
        prompts: Number of prompts.
    """

    agreement: Agreement
    tolerance: FuseTolerance
    prompts: int

    @property
    def problems(self) -> list[str]:
        """Differences beyond the tolerance; empty if the fused model is good."""
        actual, allowed = self.agreement, self.tolerance
        checks = (
            ("logits differ by", actual.relative_logit_difference,
             allowed.max_logit_difference),
            ("loss differs by", abs(actual.loss_difference),
             allowed.max_loss_difference),
            ("greedy tokens differ at", 1 - actual.same_top_token,
             1 - allowed.min_same_tokens),
        )  # fmt: skip
        return [
            f"{what} {value:.2g}, allowed {limit:.2g}"
            for what, value, limit in checks
            if not value <= limit + 1e-12  # NaN is a problem too
        ]

    def line(self) -> str:
        """Summarize the figures in one line."""
        actual = self.agreement
        prompts = "1 prompt" if self.prompts == 1 else f"{self.prompts} prompts"
        return (
            f"Fused against unfused on {prompts} ({actual.tokens} tokens): "
            f"logits differ by {actual.relative_logit_difference:.2g} (relative), loss "
            f"by {actual.loss_difference:+.2g}, greedy tokens the same at "
            f"{actual.same_top_token:.1%}"
        )


def verify_fused(
    model: str | Path,
    adapter_path: str | Path,
    fused_path: str | Path,
    *,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 32,
    tolerance: FuseTolerance | None = None,
    check_base: bool = True,
    trust_remote_code: bool = False,
) -> FuseVerification:
    """Compare a fused with an unfused model on prompts and their continuations.

    The unfused model continues the prompts; then both models are compared on the same
    rows. Only one model is in memory at a time. The low-rank remainder of a lossless
    fuse is attached to the fused model.

    Args:
        model: The base, a local folder or a Hub id.
        adapter_path: The adapter that was fused.
        fused_path: Folder of the fused model.
        prompts: Texts to continue.
        max_tokens: Maximum length of a continuation, in tokens.
        tolerance: Largest allowed differences.
        check_base: Whether to refuse an adapter that was trained on another model.
        trust_remote_code: Whether to run Python code from the models' folders.

    Raises:
        DoRAError: If a model cannot be loaded, or there are no prompts or tokens.
    """
    if not prompts:
        raise DoRAError("prompts must hold at least one prompt, got none.")
    if max_tokens < 1:
        raise DoRAError(f"max_tokens must be at least 1, got {max_tokens}.")
    unfused, tokenizer = load(
        model,
        adapter_path,
        check_base=check_base,
        trust_remote_code=trust_remote_code,
    )
    rows = [_continued(unfused, tokenizer, text, max_tokens) for text in prompts]
    longest = max(len(tokens) for tokens, _ in rows)
    probe = take_probe(unfused, rows, rows=len(rows), max_seq_length=longest)
    del unfused
    mx.clear_cache()
    rest = Path(fused_path) / REST_NAME
    fused, _ = load(
        fused_path,
        rest if rest.is_dir() else None,
        trust_remote_code=trust_remote_code,
    )
    return FuseVerification(
        agreement=compare_probe(fused, probe),
        tolerance=tolerance or FuseTolerance(),
        prompts=len(rows),
    )


def _continued(
    model: nn.Module, tokenizer: Any, prompt: str, max_tokens: int
) -> Example:
    """A prompt with its greedy continuation; every token but the first is a target."""
    from mlx_lm import stream_generate

    tokens = list(tokenizer.encode(prompt))
    steps = stream_generate(model, tokenizer, prompt=tokens, max_tokens=max_tokens)
    return tokens + [step.token for step in steps], 1
