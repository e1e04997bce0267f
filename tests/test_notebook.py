"""Results are short at a prompt and safe tables in a notebook."""

from pathlib import Path

import mlx.nn as nn
import pytest

import mlx_dora
from mlx_dora import DoRAConfig, apply_dora
from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.notebook import MAX_REPR, MAX_ROWS, Shown
from mlx_dora.train import StepReport


class Result(Shown):
    def facts(self) -> dict[str, object]:
        return {"name": "<b>\x1b[2J", "loss": 0.123456789, "none": None}

    def table(self) -> list[dict[str, object]]:
        return [{"matrix": f"<{i}>", "ΔD": i / 3} for i in range(MAX_ROWS + 2)]


def test_a_repr_has_the_facts() -> None:
    assert repr(Result()) == "Result(name='<b>\\x1b[2J', loss=0.1235, none=None)"


def test_a_table_is_escaped_and_cut() -> None:
    html = Result()._repr_html_()
    assert "<tr><td>name</td><td>&lt;b&gt;\\x1b[2J</td></tr>" in html
    assert "<tr><th>matrix</th><th>ΔD</th></tr>" in html
    assert "<tr><td>&lt;1&gt;</td><td>0.3333</td></tr>" in html
    assert html.count("<tr>") == 3 + 1 + MAX_ROWS
    assert html.endswith("<p>and 2 more</p>")


def test_an_adapter_and_its_analyses_are_short(tiny_model: nn.Module) -> None:
    config = DoRAConfig(rank=2, num_layers=-1)
    apply_dora(tiny_model, config)
    adapter = take_adapter(tiny_model)
    mlx_dora.remove_dora(tiny_model)
    analysis = mlx_dora.analyze_adapter(adapter, tiny_model)
    comparison = mlx_dora.compare_adapters([adapter, adapter], tiny_model)
    merged = mlx_dora.merge_adapters([adapter, adapter], model=tiny_model)
    assert repr(adapter).startswith(
        "Adapter(fine_tune_type='dora', rank=2, scale=20, modules=14, parameters="
    )
    for result in (adapter, analysis, comparison, merged):
        assert len(repr(result)) <= MAX_REPR
        html = result._repr_html_()
        assert html.startswith(f"<b>{type(result).__name__}</b><table>")
        assert "self_attn.q_proj" in html


def test_a_long_repr_is_cut() -> None:
    comparison = AdapterComparison(
        adapters=[f"folder/{i}" for i in range(99)], pairs=[], ranks={}
    )
    object.__setattr__(comparison, "facts", lambda: {"a": "x" * 500, "b": "y" * 99})
    cut = ("x" * 37, "x" * 37)
    assert repr(comparison).startswith(f"AdapterComparison(a='{cut[0]}...{cut[1]}'")
    many = Result()
    many.facts = lambda: {str(i): "z" * 30 for i in range(30)}
    assert len(repr(many)) == MAX_REPR
    assert repr(many).endswith("...)")


def test_layers_say_rank_and_scale(tiny_model: nn.Module) -> None:
    config = DoRAConfig(
        rank=3, scale=2.5, num_layers=-1, keys=("self_attn.q_proj",),
        magnitude_keys=("self_attn.v_proj",),
    )  # fmt: skip
    apply_dora(tiny_model, config)
    text = repr(tiny_model)
    assert "(q_proj): DoRALinear(rank=3, scale=2.5\n" in text
    assert "(magnitude only\n" in text


def test_a_step_report_prints_as_a_line_and_is_short() -> None:
    layers = {"l": {"delta_m": 0.1}}
    report = StepReport(
        step=3, train_loss=1.25, trained_tokens=9, seconds=1.0,
        peak_memory_bytes=5, layers=layers,
    )  # fmt: skip
    assert str(report) == "step 3  loss 1.2500"
    assert repr(report) == (
        "StepReport(step=3, train_loss=1.25, trained_tokens=9, seconds=1, "
        "peak_memory_bytes=5)"
    )


def test_a_saved_adapter_records_the_model_it_was_loaded_from(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, _ = mlx_dora.load(str(tiny_model_folder))
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    mlx_dora.save_adapter(model, tmp_path / "a")
    saved = mlx_dora.load_adapter(tmp_path / "a")
    assert saved.base.model == str(tiny_model_folder)


def test_a_config_given_as_a_dict_is_a_type_error(tiny_model: nn.Module) -> None:
    with pytest.raises(TypeError, match="config must be a DoRAConfig, got dict"):
        apply_dora(tiny_model, {"rank": 8})  # pyright: ignore[reportArgumentType]


def test_dir_is_the_public_names() -> None:
    assert dir(mlx_dora) == sorted(["__version__", *mlx_dora.__all__])
    assert mlx_dora.finetune is mlx_dora.train.finetune  # pyright: ignore
