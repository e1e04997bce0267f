"""Training, resuming, saving and loading of variants."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, disabled, fuse_dora, load_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.surgery import dora_layers, remove_dora
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from mlx_dora.train import TrainConfig, plan_memory
from mlx_dora.train.run.checkpoint import newest_checkpoint
from tests.checks import assert_close, to_numpy
from tests.train.conftest import EXAMPLES
from tests.train.saved import config, log, same_bits, tensors

Run = Callable[..., tuple[Any, Any]]
WAYS: dict[str, dict[str, Any]] = {
    "adaptive": {"variant": "adaptive", "rank_every": 2, "rank_rounds": 3},
    "bidora": {"variant": "bidora", "magnitude_share": 0.4},
    "doran": {"variant": "doran"},
    "doran-aux": {
        "variant": "doran-aux",
        "aux_width": 2,
        "rank_pattern": {"self_attn.v_proj": 3},
    },
    "edora": {"variant": "edora"},
    "magnitude": {"variant": "magnitude"},
    "map": {"variant": "map"},
    "mixed": {"keys": ["self_attn.q_proj"], "magnitude_keys": ["mlp.up_proj"]},
    "pissa": {"init": "pissa"},
    "prediag": {"variant": "prediag"},
}
TOKENS = mx.array([[1, 12, 13, 14, 15, 2]])
STOCHASTIC = {"dropout": 0.2}


def settings(way: str) -> dict[str, Any]:
    return WAYS[way] | ({} if way == "magnitude" else STOCHASTIC)


@pytest.mark.parametrize("way", WAYS)
def test_the_saved_adapter_is_the_trained_model(
    run: Run, make_tiny_model: Callable[..., nn.Module], way: str
) -> None:
    trained: list[mx.array] = []

    def look(_step: Any) -> None:
        trained.append(model(TOKENS))
        mx.eval(trained[-1])

    model: Any = make_tiny_model()
    base = model(TOKENS)
    _, report = run(
        **WAYS[way], iters=6, steps_per_report=6, model=model, callback=look
    )
    assert all(type(layer) is DoRALinear for _, layer in dora_layers(model))
    variant = to_numpy(trained[-1])  # the report comes before the export
    assert_close(model(TOKENS), variant, bound=2e-5)
    moved = np.abs(variant - to_numpy(base)).max()
    assert moved > 1e-3
    folder = report.adapter_path
    fresh: Any = make_tiny_model()
    attach_adapter(fresh, load_adapter(folder))
    fresh.eval()
    assert_close(fresh(TOKENS), variant, bound=2e-5)
    saved = config(folder)
    assert saved["mlx_dora"]["variant"] == "dora"
    assert saved["mlx_dora"]["training"]["rank"] == 4
    rank = {"pissa": 8, "magnitude": 1}.get(way, 4)
    if way == "adaptive":
        ranks = saved["mlx_dora"]["rank_pattern"]
        rank = max(ranks.values())
        assert min(ranks.values()) < 4 < rank <= 8
    assert saved["lora_parameters"]["rank"] == rank
    line = next(line for line in log(folder) if "delta_m" in line)
    assert np.isfinite([line["delta_m"], line["delta_d"], line["gain_min"]]).all()


@pytest.mark.parametrize("way", WAYS)
def test_mlx_lm_loads_the_saved_adapter(
    run: Run, make_tiny_model: Callable[..., nn.Module], way: str
) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model, report = run(**WAYS[way], iters=3)
    stock: Any = load_adapters(make_tiny_model(), str(report.adapter_path))
    stock.eval()
    assert_close(stock(TOKENS), to_numpy(model(TOKENS)), bound=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_run(run: Run, way: str) -> None:
    common = {
        **settings(way),
        "save_every": 2,
        "grad_accumulation_steps": 2,
        "valid": EXAMPLES[:4],
        "steps_per_eval": 4,
        "steps_per_report": 2,
        "batch_size": 2,
    }
    _, whole = run("whole", **common, iters=8)
    _, part = run("part", **common, iters=4)
    _, again = run("part", **common, iters=8, resume=True)
    first, second = whole.adapter_path, again.adapter_path
    assert same_bits(tensors(first), tensors(second))
    assert same_bits(tensors(first / "best"), tensors(second / "best"))
    states = [newest_checkpoint(path, multiple_of=2) for path in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    assert same_bits(states[0].weights, states[1].weights)
    assert same_bits(states[0].optimizer, states[1].optimizer)
    losses = [
        [line.get("train_loss") for line in log(path)] for path in (first, second)
    ]
    assert losses[0] == losses[1]
    assert part.steps == 4
    with pytest.raises(DoRAError, match=r"adapter\.(variant|init|magnitude_keys) was"):
        run("part", iters=8, resume=True)


def test_gradient_checkpointing_does_not_change_variants(run: Run) -> None:
    for way in ("bidora", "doran", "doran-aux", "edora", "pissa"):
        _, plain = run(f"{way}-plain", **WAYS[way])
        _, saving = run(f"{way}-saving", **WAYS[way], grad_checkpoint=True)
        for name, value in tensors(plain.adapter_path).items():
            other = tensors(saving.adapter_path)[name]
            assert_close(other, to_numpy(value), bound=1e-5)


def test_shared_projections_of_a_block_are_stored_once(run: Run) -> None:
    model, report = run(**WAYS["doran-aux"], iters=2, save_every=2)
    checkpoint = newest_checkpoint(report.adapter_path, multiple_of=1)
    assert checkpoint is not None
    shared = {n: v.shape for n, v in checkpoint.weights.items() if ".first." in n}
    at = "model.layers.{}.mlp.down_proj.first.{}"  # the first in natural order
    assert shared == {
        **{at.format(block, "a"): (8, 4) for block in (0, 1)},
        **{at.format(block, "b"): (4, 8) for block in (0, 1)},
    }
    moments = [name for name in checkpoint.optimizer if ".first." in name]
    assert len(moments) == 2 * len(shared)
    weights = {n: v for n, v in checkpoint.weights.items() if n.startswith("model")}
    assert report.trainable_parameters == sum(v.size for v in weights.values())
    assert not [n for n, _ in tree_flatten(model.parameters()) if ".first." in n]


def test_only_projections_of_one_block_share(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model: Any = make_tiny_model(tie_word_embeddings=False)
    keys = ("self_attn.q_proj", "self_attn.v_proj", "lm_head")
    config = DoRAConfig(variant="doran-aux", keys=keys, rank=2, num_layers=-1)
    apply_dora(model, config)
    names = [n for n, _ in tree_flatten(model.trainable_parameters()) if "first" in n]
    assert sorted(names) == [
        *(f"lm_head.first.{leaf}" for leaf in "ab"),
        *(f"model.layers.{i}.self_attn.q_proj.first.{x}" for i in (0, 1) for x in "ab"),
    ]
    first, last = (block.self_attn for block in model.model.layers)
    assert first.v_proj.kind.first is first.q_proj.first
    assert last.v_proj.kind.first is last.q_proj.first is not first.q_proj.first
    remove_dora(model)
    assert not [n for n, _ in tree_flatten(model.parameters()) if "first" in n]


def test_weights_of_a_checkpoint_start_another_run(run: Run, tmp_path: Path) -> None:
    _, report = run(**WAYS["pissa"], iters=4, save_every=2)
    start = report.adapter_path / "checkpoints" / "4"
    _, more = run("more", **WAYS["pissa"], iters=1, resume_adapter_file=str(start))
    assert more.steps == 1
    with pytest.raises(DoRAError, match=r"it lacks model\..*\.start_a"):
        run("no", **WAYS["pissa"], resume_adapter_file=str(report.adapter_path))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_starts_as_its_base(
    make_tiny_model: Callable[..., nn.Module], way: str
) -> None:
    model: Any = make_tiny_model()
    base = model(TOKENS)
    ours = {field.name for field in fields(DoRAConfig)}
    kept = {name: value for name, value in WAYS[way].items() if name in ours}
    apply_dora(model, DoRAConfig(**{"rank": 4, "num_layers": -1, **kept}))
    if way == "pissa":  # A and B cancel A0 and B0 up to rounding
        assert_close(model(TOKENS), to_numpy(base), bound=1e-4)
    else:
        assert mx.array_equal(model(TOKENS), base)


def test_a_variant_in_memory_is_fused_disabled_and_removed(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model: Any = make_tiny_model()
    base = model(TOKENS)
    apply_dora(model, DoRAConfig(variant="prediag", rank=2, scale=1.0, num_layers=-1))
    for _, layer in dora_layers(model):
        layer["d"] = layer["d"] * 1.3
    adapted = to_numpy(model(TOKENS))
    with disabled(model):
        assert mx.array_equal(model(TOKENS), base)
    fuse_dora(model)
    assert_close(model(TOKENS), adapted, bound=2e-5)
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(init="pissa", rank=2, num_layers=-1))
    remove_dora(model)
    assert mx.array_equal(model(TOKENS), base)


def test_magnitude_keys_train_only_magnitudes(
    make_tiny_model: Callable[..., nn.Module],
) -> None:
    model = make_tiny_model()
    paths = apply_dora(model, DoRAConfig(magnitude_keys=("mlp.up_proj",), num_layers=1))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(paths) == 7
    assert [n for n in names if "up_proj" in n] == ["model.layers.1.mlp.up_proj.m"]
    assert sum(n.endswith(".lora_a") for n in names) == 6


def test_inconsistent_settings_are_refused(
    run: Run, make_tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    for way in WAYS:
        with pytest.raises(DoRAError, match="with fine_tune_type lora leave them out"):
            run(**WAYS[way], fine_tune_type="lora")
    with pytest.raises(DoRAError, match="Embedding cannot take map, which adapts"):
        run(variant="map", keys=["model.embed_tokens"])
    with pytest.raises(DoRAError, match=r"both name model\.layers\.0\.mlp\.up_proj"):
        run(keys=["model.layers.0.mlp.up_proj"], magnitude_keys=["mlp.up_proj"])
    with pytest.raises(DoRAError, match=r"no module is called 'mlp\.upproj'"):
        run(magnitude_keys=["mlp.upproj"])
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, num_layers=-1))
    with pytest.raises(DoRAError, match="is adapted as dora, the config asks for map"):
        run(model=model, variant="map")
    for settings in ({"variant": "magnitude"}, {"variant": "edora"}):
        with pytest.raises(DoRAError, match="no parameter named lora_b is trained"):
            run(**settings, lora_plus_ratio=4.0)
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(variant="doran-aux", rank=4, scale=2.0, num_layers=-1))
    with pytest.raises(DoRAError, match="has aux_width 1, the config says 2"):
        run(model=model, **(WAYS["doran-aux"] | {"rank_pattern": None}))
    with pytest.raises(DoRAError, match="no memory plan for variants"):
        plan_memory(TrainConfig(model="m"), DoRAConfig(variant="map"))
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_variant_is_refused(run: Run) -> None:
    _, report = run(iters=1)
    path = report.adapter_path / "adapter_config.json"
    content = json.loads(path.read_text())
    content["mlx_dora"]["variant"] = "map"
    path.write_text(json.dumps(content))
    with pytest.raises(DoRAError, match=r"mlx_dora\.variant must be dora, got 'map'"):
        load_adapter(report.adapter_path)
