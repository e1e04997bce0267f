"""A batch of rows with different adapters against each adapter alone."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_dora import Adapter, DoRAConfig, DoRAError, remove_dora
from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.gathered import GatheredAdapters
from mlx_dora.adapters.surgery import FineTuneType, adapter_layers, apply_layers
from mlx_dora.layers.gathered import BASE
from tests.adapters.stacks import EXPERTS, make_adapter, make_model
from tests.checks import assert_close, to_numpy

RANKS = (4, 8, 8, 16, 16, 32, 32, 64)


def trained(
    model: nn.Module, rank: int, kind: FineTuneType, keys: tuple[str, ...] | None = None
) -> Adapter:
    """An adapter of any rank as if trained; the model is unchanged."""
    mx.random.seed(rank)
    config = DoRAConfig(rank=rank, scale=2.0, num_layers=-1, keys=keys)
    apply_layers(model, config, kind, any_rank=True)
    for _, layer in adapter_layers(model):
        layer["lora_b"] = 0.05 * mx.random.normal(layer["lora_b"].shape)
        if "m" in layer:
            layer["m"] = layer["m"] * (1 + 0.05 * mx.random.normal(layer["m"].shape))
    adapter = take_adapter(model)
    mx.eval(adapter.tensors)
    remove_dora(model)
    return adapter


def eight(model: nn.Module) -> list[Adapter]:
    kinds: tuple[FineTuneType, ...] = ("dora", "lora")
    return [trained(model, rank, kinds[i % 2]) for i, rank in enumerate(RANKS)]


def alone(model: nn.Module, adapter: Adapter, tokens: mx.array) -> mx.array:
    attach_adapter(model, adapter, check_base=False)
    model.eval()
    logits: mx.array = model(tokens)  # pyright: ignore[reportCallIssue]
    mx.eval(logits)
    remove_dora(model)
    return logits


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize(("bits", "bound"), [(None, 1e-5), (4, 2e-3)])
def test_eight_adapters_and_the_base_give_the_logits_that_they_give_alone(
    bits: int | None, bound: float, length: int, make_tiny_model: Any
) -> None:
    model = make_tiny_model(bits=bits)
    model.eval()
    adapters = eight(model)
    tokens = mx.random.randint(0, 320, (9, length))
    expected = [alone(model, a, tokens[i : i + 1]) for i, a in enumerate(adapters)]
    expected.append(model(tokens[8:]))
    gathered = GatheredAdapters(model)
    keys = [gathered.add(adapter) for adapter in adapters]
    gathered.use([*keys, BASE])
    logits = model(tokens)
    for row, one in enumerate(expected):
        difference = mx.abs(logits[row] - one[0]).max() / mx.abs(one).max()
        assert float(difference) < bound
        assert_close(logits[row], to_numpy(one[0]), bound=bound)
    assert mx.array_equal(logits.argmax(-1), mx.concatenate(expected).argmax(-1))


@pytest.mark.parametrize("length", [1, 24])  # 24 tokens are sorted by expert
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", list(EXPERTS))
def test_experts_and_heads_of_latent_attention(
    kind: str, bits: int | None, length: int
) -> None:
    model: Any = make_model(kind, bits)
    keys = (*EXPERTS[kind], "self_attn.o_proj")
    first = make_adapter(model, 1, keys, rank=3)
    second = make_adapter(model, 2, keys[:1], rank=5, kind="dora")
    tokens = (mx.arange(5 * length).reshape(5, length) * 7) % 64
    expected = [
        alone(model, first, tokens[:1]),
        alone(model, second, tokens[1:2]),
        model(tokens[2:3]),
        alone(model, first, tokens[3:4]),
        alone(model, second, tokens[4:]),
    ]
    gathered = GatheredAdapters(model)
    one, two = (gathered.add(adapter) for adapter in (first, second))
    gathered.use([one, two, BASE, one, two])
    logits = model(tokens)
    for row, truth in enumerate(expected):
        assert_close(logits[row], to_numpy(truth[0]), bound=2e-3 if bits else 1e-5)
    different = mx.abs(expected[0] - alone_base(model, gathered, tokens[:1])).max()
    assert float(different) > 1e-3  # the adapter does something


def alone_base(model: Any, gathered: GatheredAdapters, tokens: mx.array) -> mx.array:
    gathered.use([BASE])
    return model(tokens)


def test_a_wrong_order_of_sorted_tokens_would_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = make_model("qwen3_moe")
    adapter = make_adapter(model, 1, EXPERTS["qwen3_moe"])
    tokens = (mx.arange(96).reshape(4, 24) * 7) % 64
    gathered = GatheredAdapters(model)
    key = gathered.add(adapter)
    gathered.use([key, BASE, key, BASE])
    right = model(tokens)
    plain = gathered._rows.sorted_values
    monkeypatch.setattr(
        gathered._rows, "sorted_values", lambda values, path: plain(values[::-1], path)
    )
    assert float(mx.abs(model(tokens) - right).max()) > 1e-3


def test_a_bias_is_kept() -> None:
    from mlx_lm.models import qwen2

    mx.random.seed(0)
    model: Any = qwen2.Model(
        qwen2.ModelArgs(
            model_type="qwen2",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=320,
        )
    )
    for block in model.layers:
        block.self_attn.q_proj.bias = mx.random.normal((32,))
    model.eval()
    adapters = [trained(model, 4, "dora"), trained(model, 8, "lora")]
    tokens = mx.random.randint(0, 320, (3, 4))
    expected = [alone(model, a, tokens[i : i + 1]) for i, a in enumerate(adapters)]
    gathered = GatheredAdapters(model)
    gathered.use([*(gathered.add(adapter) for adapter in adapters), BASE])
    for part in (tokens, tokens[:, :1]):
        logits = model(part)
        for row, truth in enumerate(expected):
            count = part.shape[1]
            assert_close(logits[row], to_numpy(truth[0, :count]), bound=1e-5)


def test_an_adapter_is_added_and_dropped_while_others_stay(tiny_model: Any) -> None:
    tiny_model.eval()
    first, second = trained(tiny_model, 4, "dora"), trained(tiny_model, 8, "lora")
    tokens = mx.random.randint(0, 320, (2, 5))
    expected = alone(tiny_model, second, tokens[1:])
    base = tiny_model(tokens)
    gathered = GatheredAdapters(tiny_model)
    one = gathered.add(first)
    gathered.use([one, BASE])
    tiny_model(tokens)
    two = gathered.add(second)
    assert two != one
    gathered.drop(one)
    three = gathered.add(first)
    assert three not in (one, two)
    gathered.use([BASE, two])
    logits = tiny_model(tokens)
    assert mx.array_equal(logits[0], base[0])
    assert_close(logits[1], to_numpy(expected[0]), bound=1e-5)


def test_an_adapter_that_does_not_fit_changes_nothing(
    tiny_model: Any, make_tiny_model: Any
) -> None:
    tiny_model.eval()
    good = trained(tiny_model, 4, "dora")
    other = make_tiny_model(hidden_size=64, intermediate_size=96)
    bad = trained(other, 4, "dora")
    gathered = GatheredAdapters(tiny_model)
    key = gathered.add(good)
    gathered.use([key])
    tokens = mx.random.randint(0, 320, (1, 5))
    before = tiny_model(tokens)
    with pytest.raises(DoRAError, match="does not fit the model"):
        gathered.add(bad)
    assert mx.array_equal(tiny_model(tokens), before)


def test_a_model_with_an_adapter_is_refused(tiny_model: Any) -> None:
    attach_adapter(tiny_model, trained(tiny_model, 4, "dora"))
    with pytest.raises(DoRAError, match="and add the adapter by name"):
        GatheredAdapters(tiny_model)


def test_experts_in_an_unknown_container_are_refused() -> None:
    model: Any = make_model("qwen3_moe")
    adapter = make_adapter(model, 1, EXPERTS["qwen3_moe"])

    class Strange(nn.Module):
        pass

    block = model.layers[0].mlp
    assert isinstance(block.switch_mlp, SwitchGLU)
    strange = Strange()
    for name, child in block.switch_mlp.children().items():
        strange[name] = child
    block.switch_mlp = strange
    gathered = GatheredAdapters(model)
    with pytest.raises(DoRAError, match="Strange calls its experts in a way"):
        gathered.add(adapter, check_base=False)
