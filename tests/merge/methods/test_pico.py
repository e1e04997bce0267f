"""Pico's calibration against its definition on dense updates, in float64."""

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Factors
from mlx_dora.merge.methods.calibrations import CALIBRATIONS, calibration_named
from mlx_dora.merge.methods.pico import pico
from tests.checks import assert_close
from tests.merge.methods.test_coordinates import dense, make_updates


def test_pico_is_its_definition_on_dense_updates() -> None:
    updates = make_updates(3, 5, 2)
    u, sizes, _ = np.linalg.svd(np.hstack([each.b for each in updates]))
    energy = np.zeros(40)
    energy[: len(sizes)] = sizes**2 / (sizes**2).sum()
    operator = (u * (1 / (1 + 2 * energy))) @ u.T  # S, on all of the output space
    for update, result in zip(updates, pico(updates), strict=True):
        assert_close(dense(result), operator @ dense(update), bound=1e-12)
        assert result.a is update.a  # A is not touched


def test_a_direction_that_all_share_shrinks_to_one_of_them() -> None:
    """T equal B's of rank 1 add up to one; what only one uses hardly shrinks."""
    first, other = make_updates(1, 1)
    shared = [Factors(a=a, b=first.b) for a in (first.a, other.a, first.a + other.a)]
    for update, result in zip(shared, pico(shared), strict=True):
        assert_close(dense(result), dense(update) / 3, bound=1e-12)
    b = np.zeros((40, 2))
    b[0, 0], b[1, 1] = 3.0, 1.0
    updates = [Factors(a=first.a, b=b[:, :1]), Factors(a=other.a, b=b[:, 1:])]
    large, small = pico(updates)
    assert_close(large.b, updates[0].b / 1.9, bound=1e-12)  # its energy is .9
    assert_close(small.b, updates[1].b / 1.1, bound=1e-12)


def test_one_update_is_unchanged_and_zeros_do_not_fail() -> None:
    (update,) = make_updates(4)
    (result,) = pico([update])
    assert_close(result.b, update.b, bound=1e-12)
    zero = Factors(a=update.a, b=np.zeros_like(update.b))
    assert not any(each.b.any() for each in pico([zero, zero]))


def test_an_unknown_calibration_lists_all() -> None:
    names = ", ".join(CALIBRATIONS)
    with pytest.raises(DoRAError, match=f"no calibration 'warm': {names}."):
        calibration_named("warm")
