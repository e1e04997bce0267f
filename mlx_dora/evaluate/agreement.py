"""Do two models say the same? A fused model against the unfused one, for instance."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.data.batches import Batch, Examples, batches_once
from mlx_dora.evaluate.loss import eval_mode, target_mask


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A model's answers on a few rows, kept so that the model itself can go.

    Args:
        batch: Tokens and lengths of the rows.
        logits: Shape ``(rows, positions, vocabulary)``, float32.
    """

    batch: Batch
    logits: mx.array


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far one model's logits are from another's.

    Args:
        max_logit_difference: Largest absolute difference of two logits.
        relative_logit_difference: Root mean square of the difference over that of the
            reference's logits.
        loss: The reference's mean loss on these tokens.
        loss_difference: The other's mean loss minus the reference's.
        same_top_token: Share of the positions where both find the same token likeliest.
        tokens: Positions compared (padding does not count).
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
    """Logits of a model on a few rows of a data set, cut to `max_seq_length`.

    Raises:
        DoRAError: If none of the rows has a target token within that length.
    """
    batch = next(batches_once(dataset, rows, max_seq_length, num_batches=1))
    return Probe(batch=batch, logits=_logits(model, batch))


def compare_probe(model: nn.Module, probe: Probe) -> Agreement:
    """Run another model on a probe's rows and compare the logits."""
    other = _logits(model, probe.batch)
    tokens, lengths = probe.batch
    targets = tokens[:, 1:]
    whole = mx.stack([mx.zeros_like(lengths[:, 1]), lengths[:, 1]], axis=1)
    mask = target_mask(whole, targets.shape[1])
    count = mask.sum()

    def total(values: mx.array) -> mx.array:
        return mx.where(mask, values, 0).sum()

    def loss(logits: mx.array) -> mx.array:
        return total(mx.fast.cross_entropy(logits, targets)) / count

    difference = other - probe.logits
    square = total(mx.square(difference).mean(axis=-1))
    reference = total(mx.square(probe.logits).mean(axis=-1))
    same = mx.argmax(other, axis=-1) == mx.argmax(probe.logits, axis=-1)
    largest = mx.where(mask, mx.abs(difference).max(axis=-1), 0).max()
    expected, found = loss(probe.logits), loss(other)
    return Agreement(
        max_logit_difference=float(largest),
        relative_logit_difference=float(mx.sqrt(square / reference)),
        loss=float(expected),
        loss_difference=float(found - expected),
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
