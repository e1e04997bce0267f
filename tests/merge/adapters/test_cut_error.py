"""Measures how cutting the rank changes the logits, layer by layer."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner

from mlx_dora import Adapter, DoRAError, load_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.surgery import adapter_layers, remove_dora
from mlx_dora.cli.merge import command
from mlx_dora.merge.adapters.cut_error import open_probe
from mlx_dora.merge.adapters.merge import merge_adapters_report
from tests.adapters.training import QV
from tests.checks import relative_rms, to_numpy
from tests.merge.adapters.test_merge import train
from tests.merge.fisher.test_estimate import job  # noqa: F401 - a fixture

MakeModel = Callable[..., nn.Module]
TOKENS = [1, 5, 9, 200, 7, 31, 44]


def logits(model: nn.Module, adapter: Adapter, cut: Adapter, paths: list[str]):
    """Logits of an adapter, with some modules taken from another adapter."""
    attach_adapter(model, adapter, check_base=False)
    for path, layer in adapter_layers(model):
        if path in paths:
            for leaf in ("lora_a", "lora_b", "m"):
                layer[leaf] = cut.tensors[f"{path}.{leaf}"]
    result = model(mx.array([TOKENS[:-1]]))
    mx.eval(result)
    remove_dora(model)
    return to_numpy(result)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["karcher", "ties"])
def test_each_layer_and_all_of_them(
    make_tiny_model: MakeModel, bits: int | None, method: str
) -> None:
    model = make_tiny_model(bits=bits)
    keys = (*QV, "mlp.down_proj")
    adapters = [train(model, 1), train(model, 2, rank=4, keys=keys)]
    kw: dict = {"model": model, "method": method}
    full = merge_adapters_report(adapters, **kw).adapter
    probe = [(TOKENS, 0)]
    result = merge_adapters_report(adapters, rank=4, probe=probe, **kw)
    cut = merge_adapters_report(adapters, rank=4, **kw)
    assert cut.logit_error is None
    assert "logits" not in "\n".join(cut.lines())
    before = logits(model, full, full, [])
    for layer in result.layers:
        expected = relative_rms(logits(model, full, cut.adapter, [layer.path]), before)
        assert layer.logit_error == pytest.approx(expected, rel=1e-3, abs=1e-7)
        line = next(text for text in result.lines() if text.startswith(layer.path))
        assert f"logits off by {layer.logit_error:.2e}" in line
    errors = {layer.path: layer.logit_error for layer in result.layers}
    if method == "karcher":  # already of rank 4
        assert errors["model.layers.0.mlp.down_proj"] == pytest.approx(0, abs=1e-6)
    assert errors["model.layers.0.self_attn.q_proj"] > 1e-4  # pyright: ignore[reportOptionalOperand]
    together = relative_rms(logits(model, full, cut.adapter, list(errors)), before)
    assert result.logit_error == pytest.approx(together, rel=1e-3)
    assert not adapter_layers(model)


def test_one_lora_adapter_is_cut_too(tiny_model: nn.Module) -> None:
    first = train(tiny_model, 1, kind="lora")
    result = merge_adapters_report(
        [first], model=tiny_model, method="nmean", rank=2, probe=[(TOKENS, 0)]
    )
    assert result.logit_error is not None
    assert result.logit_error > 1e-5


def test_the_command(job: tuple[Path, list[str]], tmp_path: Path) -> None:  # noqa: F811
    base, (a1, a2, data, _) = job
    out = str(tmp_path / "out")
    args = ["adapters", a1, a2, "--save-path", out, "--logit-error"]
    result = CliRunner().invoke(command, [*args, data, "--rank", "3"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("logits off by") == 7  # six layers and all together
    assert load_adapter(out).config.rank == 3
    assert CliRunner().invoke(command, [*args, data]).exit_code == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(DoRAError, match="none holds no data: expected train"):
        open_probe(base, str(tmp_path / "none"))
