"""Methods on singular values, against their definitions in float64."""

import numpy as np
import pytest

from tests.checks import assert_close, to_numpy
from tests.merge.methods.test_elementwise import arrays, make, methods, taus
from tests.merge.oracle import total


def test_iso_flattens_the_spectrum_of_the_weighted_sum() -> None:
    base, tuned = make()
    w = [1.0, 0.5, 2.0]
    u, sizes, v = np.linalg.svd(
        total(a * t for a, t in zip(w, taus(base, tuned), strict=True)),
        full_matrices=False,
    )
    (start,) = arrays(base)
    result = methods.iso(start, arrays(*tuned), w, scale=0.5)
    assert_close(result, base + 0.5 * sizes.mean() * (u @ v))
    flat = np.linalg.svd(to_numpy(result) - base, compute_uv=False)
    assert flat.min() == pytest.approx(flat.max(), rel=1e-4)


def test_iso_of_low_rank_changes_stays_in_their_span() -> None:
    """Not in the other directions, which would be arbitrary."""
    base = np.zeros((30, 50), np.float32)
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (30, 50))
    tuned = ((u * [3.0, 2.0, 1.0]) @ v.T).astype(np.float32)
    result = methods.iso(arrays(base)[0], arrays(tuned), [1.0])
    assert_close(result, 2.0 * (u @ v.T))
    again = methods.iso(arrays(base)[0], [result], [1.0])
    assert_close(again, to_numpy(result))  # flat once, flat for ever


def test_iso_merges_each_matrix_of_a_stack() -> None:
    base, tuned = make(2, (3, 20, 30))
    result = methods.iso(arrays(base)[0], arrays(*tuned), [1.0, 2.0])
    for index in range(3):
        pair = arrays(*(each[index] for each in tuned))
        alone = methods.iso(arrays(base[index])[0], pair, [1.0, 2.0])
        assert_close(result[index], to_numpy(alone))


def test_iso_of_vectors_and_of_no_change() -> None:
    base, tuned = make(2, (50,))
    (start,) = arrays(base)
    result = methods.iso(start, arrays(*tuned), [1.0, 3.0], scale=2.0)
    moved = taus(base, tuned)
    assert_close(result, base + 2 * (moved[0] + 3 * moved[1]) / 4)
    base, _ = make()
    result = methods.iso(arrays(base)[0], arrays(base, base), [1.0, 1.0])
    assert (to_numpy(result) == base).all()
