"""A fused model against the unfused one, on prompts that both continue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.adapters.fuse import REST_NAME
from mlx_dora.adapters.hosting import load
from mlx_dora.data.targets import Example
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.agreement import Agreement, compare_probe, take_probe
from mlx_dora.evaluate.tolerance import FuseTolerance

PROMPTS = (
    "The capital of France is Paris, and its longest river is",
    "Question: What does a hash table do, and why is looking things up fast?\nAnswer:",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "Three things to keep in mind when writing a letter are",
)
"""What is continued where the caller names no prompts."""


@dataclass(frozen=True, kw_only=True)
class FuseVerification:
    """How far a fused model is from the unfused one.

    Args:
        agreement: On the prompts and the unfused model's greedy continuations.
        tolerance: What was allowed.
        prompts: How many prompts.
    """

    agreement: Agreement
    tolerance: FuseTolerance
    prompts: int

    @property
    def problems(self) -> list[str]:
        """What is outside the tolerance; empty if the fuse is good."""
        found, allowed = self.agreement, self.tolerance
        checks = (
            ("logits differ by", found.relative_logit_difference,
             allowed.max_logit_difference),
            ("loss differs by", abs(found.loss_difference),
             allowed.max_loss_difference),
            ("greedy tokens differ at", 1 - found.same_top_token,
             1 - allowed.min_same_tokens),
        )  # fmt: skip
        return [
            f"{what} {value:.2g}, allowed {limit:.2g}"
            for what, value, limit in checks
            if not value <= limit + 1e-12  # NaN is a problem too
        ]

    def line(self) -> str:
        """The figures as a line of text."""
        found = self.agreement
        prompts = "1 prompt" if self.prompts == 1 else f"{self.prompts} prompts"
        return (
            f"Fused against unfused on {prompts} ({found.tokens} tokens): "
            f"logits differ by {found.relative_logit_difference:.2g} (relative), loss "
            f"by {found.loss_difference:+.2g}, greedy tokens the same at "
            f"{found.same_top_token:.1%}"
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
    """Let the unfused model continue prompts, and the fused one say the same rows.

    One model is in memory at a time. The low-rank rest of a lossless fuse is put onto
    the fused model.

    Args:
        model: The base: a local folder, or a Hub id.
        adapter_path: The adapter that was fused.
        fused_path: The fused folder.
        prompts: What is continued.
        max_tokens: Length of a continuation.
        tolerance: How far apart they may be.
        check_base: Refuse an adapter that was trained on another model.
        trust_remote_code: Run Python code that the models' folders bring along.

    Raises:
        DoRAError: If a model cannot be loaded, or there is nothing to say.
    """
    if not prompts:
        raise DoRAError("there must be a prompt to verify with, got none.")
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
