"""Laws of every adapter merge: copies, order, size of the weights, bases."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import Adapter, DoRAError
from mlx_dora.layers import weight_of
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.spaces import SPACES
from tests.checks import assert_close
from tests.merge.adapters.test_merge import dense_rows, known_of, train
from tests.merge.names import (
    ALL,
    CHOOSING,
    MEANS,
    NORMALIZED,
    RANDOM,
    UNNORMALIZED,
    most,
    needed,
)
from tests.merge.oracle import dense_slerp

MakeModel = Callable[..., nn.Module]
PATHS = [f"model.layers.{i}.self_attn.{key}" for i in (0, 1) for key in
         ("q_proj", "v_proj")]  # fmt: skip
FULL = 32  # rank of every matrix here


def settings(method: str, model: nn.Module, adapters: list[Adapter]) -> dict[str, Any]:
    """Arguments that a method needs besides the adapters."""
    kw: dict[str, Any] = {"model": model, "method": method}
    if method == "fisher":
        kw["fisher"] = known_of(model, adapters)
    if METHODS[method].density is not None:
        kw["density"] = 1.0
    if own := needed(method):
        kw["parameters"] = own
    return kw


def weighed(method: str, weights: list[float]) -> dict[str, Any]:
    """Weights, for a method that uses them."""
    return {"weights": weights} if METHODS[method].takes_weights else {}


def assert_same(model: nn.Module, first: Adapter, other: Adapter, bound: float) -> None:
    for path in PATHS:
        expected = dense_rows(model, other, path)
        assert_close(dense_rows(model, first, path), expected, bound=bound)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("method", [m for m in ALL if m not in CHOOSING])
def test_copies_give_the_adapter_back(
    make_tiny_model: MakeModel, method: str, count: int, bits: int | None
) -> None:
    fewest = METHODS[method].inputs[0]
    if not fewest <= count <= most(method, count):
        pytest.skip("takes more or fewer adapters")
    model = make_tiny_model(bits=bits)
    first = train(model, 1)
    weights = [1 / count] * count
    if method in ("ties", "dare_ties", "della"):
        weights = [1.0] * count
    if method == "tsv":  # two equal tasks are whitened, so differ from one
        weights = [1.0] + [0.0] * (count - 1)
    copies = [first] * count
    kw = {**settings(method, model, copies), **weighed(method, weights)}
    for rank in (None, 3):
        merged = merge_adapters(copies, rank=rank, **kw)
        assert_same(model, merged, first, 1e-6)


@pytest.mark.parametrize("space", [None, *SPACES])
@pytest.mark.parametrize("method", ALL)
def test_an_adapter_of_weight_0_changes_nothing(
    tiny_model: nn.Module, method: str, space: str | None
) -> None:
    """It takes no share of the rank, the space or the random numbers either."""
    entry = METHODS[method]
    if not entry.takes_weights or entry.inputs[1] is not None:
        pytest.skip("takes no weights, or no third adapter")
    if space is not None and not entry.takes_space:
        pytest.skip("merges in no space")
    adapters = [train(tiny_model, i, rank=2 + i) for i in range(3)]
    rank = 3 if space == "ctm" else None
    kw = {**settings(method, tiny_model, adapters), "rank": rank, "space": space}
    if entry.density is not None:
        kw["density"] = 0.4
    with_it = merge_adapters(adapters, weights=[0.4, 0, 0.6], **kw)
    if method == "fisher":
        kw["fisher"] = kw["fisher"][::2]
    without = merge_adapters(adapters[::2], weights=[0.4, 0.6], **kw)
    assert_same(tiny_model, with_it, without, 1e-7)


@pytest.mark.parametrize("method", [m for m in ALL if m not in RANDOM])
def test_the_order_of_the_adapters_does_not_matter(
    tiny_model: nn.Module, method: str
) -> None:
    """Except for methods whose random numbers depend on the position."""
    if METHODS[method].inputs == (1, 1):
        pytest.skip("merges one adapter into the base")
    count = METHODS[method].inputs[1] or 3
    adapters = [train(tiny_model, i, rank=2 + i) for i in range(count)]
    weights = [0.2, 0.3, 0.5][:count]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL}
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        kw["density"] = 0.4
    if method == "sce":
        kw["parameters"] = {"select_topk": 0.4}
    first = merge_adapters(adapters, **kw, **weighed(method, weights))
    if method == "fisher":
        kw["fisher"] = kw["fisher"][::-1]
    other = merge_adapters(adapters[::-1], **kw, **weighed(method, weights[::-1]))
    assert_same(tiny_model, first, other, 1e-5 if method == "tsv" else 1e-6)


@pytest.mark.parametrize("method", [*NORMALIZED, "ties", "dare_ties", "della"])
def test_the_size_of_the_weights_does_not_matter(
    tiny_model: nn.Module, method: str
) -> None:
    adapters = [train(tiny_model, i) for i in (1, 2)]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL}
    first, other = (
        merge_adapters(adapters, weights=[size * w for w in (0.3, 0.7)], **kw)
        for size in (1, 10)
    )
    assert_same(tiny_model, first, other, 1e-6)


@pytest.mark.parametrize("method", UNNORMALIZED)
def test_the_weights_of_a_sum_scale_the_change(
    tiny_model: nn.Module, method: str
) -> None:
    adapters = [train(tiny_model, i) for i in (1, 2)]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL}
    first = merge_adapters(adapters, weights=[0.3, 0.7], scale=2.0, **kw)
    other = merge_adapters(adapters, weights=[0.6, 1.4], **kw)
    assert_same(tiny_model, first, other, 1e-5)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_slerp_of_whole_adapters_at_its_ends_and_in_the_middle(
    tiny_model: nn.Module, t: float
) -> None:
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    merged = merge_adapters(adapters, model=tiny_model, weights=[1 - t, t])
    for path in PATHS:
        a, b = (dense_rows(tiny_model, adapter, path) for adapter in adapters)
        expected = dense_slerp(a, b, t) if t == 0.5 else (b if t else a)
        assert_close(dense_rows(tiny_model, merged, path), expected)


def test_each_row_may_have_its_own_t(tiny_model: nn.Module) -> None:
    """By pattern, since the modules have different numbers of rows."""
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    t = {"*.q_proj": np.linspace(0, 1, 32), "*.v_proj": np.linspace(1, 0, 16)}
    weights = {pattern: [1 - share, mx.array(share)] for pattern, share in t.items()}
    merged = merge_adapters(adapters, model=tiny_model, weights=weights)
    for path in PATHS:
        a, b = (dense_rows(tiny_model, adapter, path) for adapter in adapters)
        own = t[f"*.{path.rpartition('.')[2]}"]
        rows = [dense_slerp(a[[j]], b[[j]], own[j])[0] for j in range(len(a))]
        assert_close(dense_rows(tiny_model, merged, path), np.array(rows))


@pytest.mark.parametrize("bits", [4, 8])
def test_another_quantization_of_the_base_is_refused_unless_asked(
    make_tiny_model: MakeModel, bits: int
) -> None:
    model, other = make_tiny_model(bits=bits), make_tiny_model(bits=12 - bits)
    adapters = [train(model, 1), train(other, 2)]
    with pytest.raises(DoRAError, match="adapter 2 does not fit") as caught:
        merge_adapters(adapters, model=model)
    assert "\n" not in str(caught.value)
    merged = merge_adapters(adapters, model=model, check_base=False)
    assert merged.paths == sorted(PATHS)


@pytest.mark.parametrize("method", [*MEANS, "linear"])
def test_the_result_uses_the_bases_own_weights(
    make_tiny_model: MakeModel, method: str
) -> None:
    """A packed base is read packed: the rows are those of its unpacked values."""
    model = make_tiny_model(bits=4)
    first = train(model, 1)
    merged = merge_adapters([first, first], model=model, method=method)
    weight = weight_of(dict(model.named_modules())[PATHS[0]])
    assert not isinstance(weight, mx.array)
    assert_same(model, merged, first, 1e-6)
