"""Compares the logits of two models, such as a fused and an unfused model."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.data.batches import Batch, Examples, batches_once
from mlx_dora.evaluate.loss import eval_mode, target_mask
from mlx_dora.evaluate.token_loss import token_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model's logits on a few rows, stored so that the model can be freed.

    Args:
        batch: Tokens and lengths of the rows.
        logits: Logits, float32 ``(rows, positions, vocabulary)``.
    """

    batch: Batch
    logits: mx.array


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Differences between the logits of a model and those of a reference.

    Args:
        max_logit_difference: Largest absolute difference of two logits.
        relative_logit_difference: Root mean square of the difference, divided by that
            of the reference's logits.
        loss: Mean loss of the reference on the tokens.
        loss_difference: Mean loss of the model minus that of the reference.
        same_top_token: Fraction of positions where both rank the same token first.
        tokens: Number of positions compared, without padding.
    """

    max_logit_difference: float
    relative_logit_difference: float
    loss: float
    loss_difference: float
    same_top_token: float
    tokens: int


def take_probe(
    model: nn.Module, dataset: Examples, *, rows: int = 4, max_seq_length: int = 128
) -> Probe:
    """Compute the logits on a few rows of a data set, cut to `max_seq_length`.

    Raises:
        DoRAError: If none of the rows has a target token within that length.
    """
    batch = next(batches_once(dataset, rows, max_seq_length, num_batches=1))
    return Probe(batch=batch, logits=_logits(model, batch))


def compare_probe(model: nn.Module, probe: Probe) -> Agreement:
    """Run a model on a probe's rows and compare its logits with the probe's."""
    other = _logits(model, probe.batch)
    tokens, lengths = probe.batch
    targets = tokens[:, 1:]
    whole = mx.stack([mx.zeros_like(lengths[:, 1]), lengths[:, 1]], axis=1)
    mask = target_mask(whole, targets.shape[1])
    count = mask.sum()

    def total(values: mx.array) -> mx.array:
        return mx.where(mask, values, 0).sum()

    def loss(logits: mx.array) -> mx.array:
        return total(token_cross_entropy(logits, targets)) / count

    difference = other - probe.logits
    square = total(mx.square(difference).mean(axis=-1))
    reference = total(mx.square(probe.logits).mean(axis=-1))
    same = mx.argmax(other, axis=-1) == mx.argmax(probe.logits, axis=-1)
    largest = mx.where(mask, mx.abs(difference).max(axis=-1), 0).max()
    before, after = loss(probe.logits), loss(other)
    return Agreement(
        max_logit_difference=float(largest),
        relative_logit_difference=float(mx.sqrt(square / reference)),
        loss=float(before),
        loss_difference=float(after - before),
        same_top_token=float(total(same) / count),
        tokens=int(count),
    )


def agreement(
    reference: nn.Module,
    other: nn.Module,
    dataset: Examples,
    *,
    rows: int = 4,
    max_seq_length: int = 128,
) -> Agreement:
    """Compare the logits of two models on a few rows of a data set."""
    probe = take_probe(reference, dataset, rows=rows, max_seq_length=max_seq_length)
    return compare_probe(other, probe)


def _logits(model: nn.Module, batch: Batch) -> mx.array:
    tokens, _ = batch
    with eval_mode(model):
        logits = model(tokens[:, :-1]).astype(mx.float32)
        mx.eval(logits)
    return logits
