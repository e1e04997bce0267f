"""Spaces of adapters against dense float64 computations."""

from collections.abc import Callable

import numpy as np
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.matrix import Factors
from mlx_dora.merge.methods.coordinates import Coordinates
from mlx_dora.merge.methods.spaces import SPACES, WEIGHT, space_named
from tests.checks import assert_close

FACTORED = [name for name in SPACES if name != WEIGHT]
LOSSLESS = [name for name in FACTORED if not SPACES[name].needs_rank]


def make_updates(*ranks: int, rows: int = 40, width: int = 60) -> list[Factors]:
    rng = np.random.default_rng(len(ranks))
    return [
        Factors(a=rng.standard_normal((width, r)), b=rng.standard_normal((rows, r)))
        for r in ranks
    ]


def dense(update: Factors) -> np.ndarray:
    return update.b @ update.a.T


def in_space(name: str, updates: list[Factors], rank: int | None = None) -> Coordinates:
    return SPACES[name].function(updates, rank)


def columns_agree(first: np.ndarray, other: np.ndarray) -> None:
    """Equal up to the signs of columns, which a decomposition leaves open."""
    assert_close(np.abs(first.T @ other), np.eye(first.shape[1]), bound=1e-8)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("ranks", [(4,), (3, 5), (1, 8, 2), (30, 30)])
def test_coordinates_lose_nothing(name: str, ranks: tuple[int, ...]) -> None:
    """Also where the ranks add up to more than the matrix has rows."""
    updates = make_updates(*ranks)
    space = in_space(name, updates)
    k = min(sum(ranks), 40)
    assert space.left.shape == (40, k)
    assert_close(space.left.T @ space.left, np.eye(k), bound=1e-12)
    for update, part in zip(updates, space.parts, strict=True):
        assert_close(dense(space.lifted(part)), dense(update), bound=1e-12)


@pytest.mark.parametrize("name", LOSSLESS)
def test_copies_and_zeros_add_no_rank(name: str) -> None:
    first, other = make_updates(4, 3)
    zero = Factors(a=other.a, b=np.zeros_like(other.b))
    twice = Factors(a=2 * first.a, b=first.b / 2)
    space = in_space(name, [first, twice, zero])
    assert (
        space.left.shape[1] == 11
    )  # as in the papers, so that shares of it are theirs
    assert_close(space.parts[0], space.parts[1], bound=1e-12)
    assert not space.parts[2].any()
    lifted = space.lifted(space.parts[0])
    assert lifted.a.shape[1] == 4
    assert_close(dense(lifted), dense(first), bound=1e-12)
    nothing = space.lifted(space.parts[2])
    assert nothing.a.shape[1] == 1  # an adapter has a rank of at least 1
    assert not dense(nothing).any()


def test_core_bases_are_those_of_the_stacked_factors() -> None:
    updates = make_updates(3, 5)
    space = in_space("core", updates)
    left = np.linalg.svd(np.hstack([each.b for each in updates]))[0]
    right = np.linalg.svd(np.hstack([each.a for each in updates]))[0]
    assert space.right is not None
    columns_agree(space.left, left[:, :8])
    columns_agree(space.right, right[:, :8])
    for update, part in zip(updates, space.parts, strict=True):
        assert_close(part, space.left.T @ dense(update) @ space.right, bound=1e-12)


def test_knots_coordinates_are_those_of_the_updates_side_by_side() -> None:
    updates = make_updates(3, 5)
    space = in_space("knots", updates)
    u, sizes, v = np.linalg.svd(np.hstack([dense(each) for each in updates]))
    columns_agree(space.left, u[:, :8])
    assert space.right is None
    turned = np.sign((space.left * u[:, :8]).sum(0))[:, None]
    whole = np.hstack(space.parts) * turned
    assert_close(whole, sizes[:8, None] * v[:8], bound=1e-10)


def kept(updates: list[Factors], left: np.ndarray, right: np.ndarray) -> list[float]:
    """Share of each update's norm, squared, in two subspaces."""
    sizes = [np.linalg.norm(dense(each)) for each in updates]
    inside = [np.linalg.norm(left.T @ dense(each) @ right) for each in updates]
    return [float((a / b) ** 2) for a, b in zip(inside, sizes, strict=True)]


def test_ctm_finds_the_subspaces_of_hooi_on_dense_updates() -> None:
    updates = make_updates(3, 5, 4)
    updates[2] = Factors(a=updates[2].a, b=100 * updates[2].b)  # counts no more
    units = [dense(each) / np.linalg.norm(dense(each)) for each in updates]
    left, right = (
        np.linalg.svd(np.hstack(side))[0][:, :6]
        for side in (units, [each.T for each in units])
    )
    start = sum(kept(updates, left, right))
    for _ in range(300):
        left = np.linalg.svd(np.hstack([each @ right for each in units]))[0][:, :6]
        right = np.linalg.svd(np.hstack([each.T @ left for each in units]))[0][:, :6]
    space = in_space("ctm", updates, 6)
    assert space.right is not None
    found, best = kept(updates, space.left, space.right), kept(updates, left, right)
    assert start + 1e-3 < sum(found) == pytest.approx(sum(best), rel=1e-3)
    assert min(found) > 0.4  # the large update does not crowd out the others
    for update, part in zip(updates, space.parts, strict=True):
        assert part.shape == (6, 6)
        assert_close(part, space.left.T @ dense(update) @ space.right, bound=1e-12)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_ctm_of_one_adapter_is_its_best_cut(rank: int) -> None:
    (update,) = make_updates(5)
    space = in_space("ctm", [update, update], rank)
    cut = dense(space.lifted(space.parts[0]))
    u, sizes, v = np.linalg.svd(dense(update))
    sizes = sizes[: min(rank, 5)]
    assert_close(cut, (u[:, : len(sizes)] * sizes) @ v[: len(sizes)], bound=1e-6)


def test_the_update_has_the_rank_of_the_coordinates() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((9, 5)), rng.standard_normal((8, 4))
    for right_or_none, width in ((right, 4), (None, 8)):
        merged = rng.standard_normal((5, 3)) @ rng.standard_normal((3, width))
        space = Coordinates(left=left, parts=[], right=right_or_none)
        lifted = space.lifted(merged)
        assert lifted.a.shape[1] == lifted.b.shape[1] == 3
        end = merged if right_or_none is None else merged @ right.T
        assert_close(dense(lifted), left @ end, bound=1e-12)


def test_an_unknown_space_lists_all() -> None:
    with pytest.raises(DoRAError, match=f"no space 'warp': {', '.join(SPACES)}."):
        space_named("warp")


@pytest.mark.parametrize("name", FACTORED)
def test_every_entry_names_a_function(name: str) -> None:
    function: Callable = SPACES[name].function
    assert callable(function)
