import mlx.nn as nn
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRAEmbedding, DoRALinear, dora_class


class GatedLinear(nn.Linear):
    def __call__(self, x):
        return x * super().__call__(x)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Linear(32, 32), DoRALinear),
        (nn.Linear(32, 32).to_quantized(32, 4), DoRALinear),
        (nn.Embedding(32, 32), DoRAEmbedding),
        (nn.QuantizedEmbedding(32, 32, 32, 4), DoRAEmbedding),
    ],
)
def test_supported_modules_get_their_layer(module, layer):
    assert dora_class(module) is layer


def test_a_layer_itself_refuses_a_subclass():
    with pytest.raises(DoRAError, match="GatedLinear cannot take DoRA"):
        DoRALinear.from_base(GatedLinear(8, 8))


@pytest.mark.parametrize(
    "module", [GatedLinear(8, 8), nn.Bilinear(4, 4, 4), nn.RMSNorm(8)]
)
def test_other_modules_are_refused_by_name(module):
    with pytest.raises(DoRAError, match=type(module).__name__):
        dora_class(module)
