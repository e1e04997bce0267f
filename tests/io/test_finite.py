import mlx.core as mx
import pytest

from mlx_dora.io.finite import not_finite


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_every_tensor_with_a_bad_value_is_named(dtype: mx.Dtype, bad: float) -> None:
    good = mx.ones((3, 5)).astype(dtype)
    wrong = mx.array([[1.0, bad], [2.0, 3.0]]).astype(dtype)
    tensors = {"a": wrong, "b": good, "c": wrong, "d": mx.array([1, 2])}
    assert not_finite(tensors) == ["a", "c"]


def test_opposite_infinities_do_not_cancel() -> None:
    assert not_finite({"a": mx.array([float("inf"), float("-inf")])}) == ["a"]


@pytest.mark.parametrize("value", [3e38, 6e4])
def test_a_sum_that_overflows_names_no_tensor(value: float) -> None:
    dtype = mx.float16 if value < 1e5 else mx.float32
    assert not_finite({"a": mx.full((1000,), value).astype(dtype)}) == []
