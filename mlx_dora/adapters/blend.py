"""Several adapters of one weight as one, from their factored terms."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.factored import FactoredTerms, factored_terms
from mlx_dora.kernels.reference import row_gain
from mlx_dora.kernels.rows import Weight, are_ordinary

# Where less of W0 than this is left in a row, what remains is noise.
_LEAST_SHARE = 2.0**-10
# Under this share of the squared lengths the factored norm is taken from dense rows.
_RECOMPUTE_BELOW = 2.0**-6


@dataclass(frozen=True, kw_only=True)
class Part:
    """One adapter of a weight ``(out, in)``, with what is known of it.

    Attributes:
        down: A. Shape ``(in, r)``.
        up: B. Shape ``(r, out)``.
        m: Magnitudes. Shape ``(out,)``.
        terms: Inner products of the base's rows with the update s·BA.
    """

    down: mx.array
    up: mx.array
    m: mx.array
    terms: FactoredTerms


@dataclass(frozen=True, kw_only=True)
class Blend:
    """An adapter with multiplier 1. `norm` is ‖W0 + BA‖, the rest as in `Part`."""

    down: mx.array
    up: mx.array
    m: mx.array
    norm: mx.array


def blend(weight: Weight, parts: Sequence[tuple[float, Part]]) -> Blend:
    r"""The weighted sum of what adapters change, as one DoRA adapter.

    .. math:: W' = W_0 + \sum_i w_i (W'_i - W_0) = G \circ (W_0 + \sum_i
        \tfrac{w_i g_i s_i}{G} \circ B_i A_i), \qquad G = 1 + \sum_i w_i (g_i - 1)

    with g = m/‖W0 + sBA‖ of each adapter: exact, of rank Σr, and without reading W0,
    but for rows that nearly cancel.

    Args:
        weight: The base weight, dense or packed.
        parts: Weight w and adapter, at least one.

    Raises:
        DoRAError: If the weights leave nothing of a base row; its count is in the
            message.
    """
    gains = [
        # A row of length 0 is 0 whatever multiplies it.
        mx.where(part.terms.norm > 0, row_gain(part.m, part.terms.norm), 1.0)
        for _, part in parts
    ]
    weights = [w for w, _ in parts]
    gain = size = mx.ones_like(gains[0])
    for w, g in zip(weights, gains, strict=True):
        gain, size = gain + w * (g - 1), size + abs(w) * mx.abs(g - 1)
    lost = int((mx.abs(gain) < _LEAST_SHARE * size).sum())
    if lost:
        raise DoRAError(
            f"these weights cancel {lost} rows of the base, and no adapter can say "
            "that; choose others."
        )
    shares = [w * g / gain for w, g in zip(weights, gains, strict=True)]
    down = mx.concatenate([part.down.astype(mx.float32) for _, part in parts], axis=1)
    up = mx.concatenate(
        [
            (part.terms.scale * share) * part.up.astype(mx.float32)
            for share, (_, part) in zip(shares, parts, strict=True)
        ]
    )
    norm = _norm(weight, down, up, shares, [part.terms for _, part in parts])
    found = Blend(down=down, up=up, m=gain * norm, norm=norm)
    mx.eval(found.down, found.up, found.m, found.norm)
    return found


def _norm(
    weight: Weight,
    down: mx.array,
    up: mx.array,
    shares: list[mx.array],
    terms: list[FactoredTerms],
) -> mx.array:
    """‖W0 + BA‖ of the concatenated factors, whose share of each ⟨W0, BA⟩ is known."""
    q0 = terms[0].squared_base
    products = zip(shares, terms, strict=True)
    cross = sum(share * (t.scale * t.cross) for share, t in products)
    rows = up.T  # (out, Σr)
    square = ((rows @ (down.T @ down)) * rows).sum(axis=1)
    squared = q0 + 2 * cross + square
    total = q0 + square
    if mx.any(squared < _RECOMPUTE_BELOW * total) or not are_ordinary(total):
        return factored_terms(weight, down, up, 1.0).norm
    return mx.sqrt(mx.maximum(squared, 0.0))
