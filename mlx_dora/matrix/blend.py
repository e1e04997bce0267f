"""Blends several adapters of one weight into one, using their factored terms."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.matrix.low_rank import Adapted, LowRank
from mlx_dora.matrix.terms import (
    ExactTerms,
    Terms,
    exact_terms,
    row_gain,
    with_exact_norm,
)
from mlx_dora.matrix.weight import Weight, are_ordinary

# If less than this share of a row of W0 is left, the rest is rounding noise.
_LEAST_SHARE = 2.0**-10


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A DoRA adapter of a weight ``(out, in)`` with its factored terms.

    Attributes:
        update: The low-rank update, float32.
        m: Magnitudes. Shape ``(out,)``.
        terms: Inner products of base rows and update rows, with the exact norm.
    """

    update: LowRank
    m: mx.array
    terms: ExactTerms


def measured(weight: Weight, adapted: Adapted) -> Measured:
    """Read the base weight once for the terms of a DoRA or LoRA adapter.

    LoRA equals DoRA with the norms of the adapted rows as magnitudes.
    """
    update = LowRank(
        lora_a=adapted.update.lora_a.astype(mx.float32),
        lora_b=adapted.update.lora_b.astype(mx.float32),
        scale=adapted.update.scale,
    )
    terms = exact_terms(weight, update)
    m = terms.norm if adapted.m is None else adapted.m.astype(mx.float32)
    mx.eval(update.lora_a, update.lora_b, m)
    return Measured(update=update, m=m, terms=terms)


def blend(weight: Weight, parts: Sequence[tuple[float, Measured]]) -> Measured:
    r"""Return the weighted sum of the adapters' changes as a DoRA adapter.

    .. math:: W' = W_0 + \sum_i w_i (W'_i - W_0) = G \circ (W_0 + \sum_i
        \tfrac{w_i g_i s_i}{G} \circ B_i A_i), \qquad G = 1 + \sum_i w_i (g_i - 1)

    with g = m/‖W0 + sBA‖ for each adapter. The result is exact and has rank Σr. W0 is
    read only for rows that nearly cancel.

    Args:
        weight: The base weight, dense or packed.
        parts: Pairs of weight w and adapter, at least one.

    Returns:
        The blended adapter, with multiplier 1.

    Raises:
        DoRAError: If the weights cancel rows of the base; the message has their number.
    """
    gains = [
        # A row of length 0 stays 0 with any gain.
        mx.where(part.terms.norm > 0, row_gain(part.m, part.terms.norm), 1.0)
        for _, part in parts
    ]
    gain = size = mx.ones_like(gains[0])
    for (w, _), g in zip(parts, gains, strict=True):
        gain, size = gain + w * (g - 1), size + abs(w) * mx.abs(g - 1)
    lost = int((mx.abs(gain) < _LEAST_SHARE * size).sum())
    if lost:
        raise DoRAError(
            f"these weights cancel {lost} rows of the base, which no adapter can "
            "express; choose other weights."
        )
    all_a, all_b = [], []
    cross = mx.zeros_like(gain)
    for (w, part), g in zip(parts, gains, strict=True):
        share = part.update.scale * (w * g / gain)
        all_a.append(part.update.lora_a)
        all_b.append(share * part.update.lora_b)
        cross = cross + share * part.terms.c
    update = LowRank(
        lora_a=mx.concatenate(all_a, axis=1),
        lora_b=mx.concatenate(all_b),
        scale=1.0,
    )
    p = update.squared_rows()
    terms = Terms(q0=parts[0][1].terms.q0, c=cross, p=p, scale=1.0)
    # The products are too inaccurate or outside the range of float32: read W0 again.
    if mx.any(terms.cancelled) or not are_ordinary(terms.parts):
        exact = exact_terms(weight, update)
    else:
        exact = with_exact_norm(weight, update, terms)
    m = gain * exact.norm
    mx.eval(update.lora_a, update.lora_b, m)
    return Measured(update=update, m=m, terms=exact)
