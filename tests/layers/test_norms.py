import mlx.core as mx
import mlx.nn as nn

from mlx_dora.layers import DoRALinear, held_norms
from tests.checks import assert_close, to_numpy
from tests.layers.oracle import trained


def block():
    mx.random.seed(0)
    return nn.Sequential(
        trained(DoRALinear.from_base(nn.Linear(32, 48))),
        nn.ReLU(),
        trained(DoRALinear.from_base(nn.Linear(48, 16)), 1),
    )


def test_held_norms_give_the_same_output_and_are_released():
    model, x = block(), mx.random.normal((4, 32))
    expected = to_numpy(model(x))
    with held_norms(model):
        assert_close(model(x), expected, bound=1e-6)
        held = model.layers[0].norm()
        assert model.layers[0].norm() is held
    assert model.layers[0].norm() is not held
    assert "_norm" not in model.layers[0]


def test_norms_are_released_after_an_error():
    model = block()
    try:
        with held_norms(model):
            raise RuntimeError
    except RuntimeError:
        pass
    assert "_norm" not in model.layers[0]


def test_held_norms_are_no_parameters():
    model = block()
    names = set(model.layers[0].parameters())
    with held_norms(model):
        assert set(model.layers[0].parameters()) == names


def test_norm_is_taken_anew_after_parameters_change():
    model = block()
    with held_norms(model):
        before = to_numpy(model.layers[0].norm())
    model.layers[0].lora_b = model.layers[0].lora_b * 4
    with held_norms(model):
        assert abs(to_numpy(model.layers[0].norm()) - before).max() > 0.01
