"""Merges whole adapters: folders, different modules, refusals, the command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora import Adapter, DoRAConfig, DoRAError, load_adapter, save_adapter
from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import adapter_layers, apply_layers, remove_dora
from mlx_dora.analyze.guidance import INDEPENDENT, SPACE
from mlx_dora.cli.merge import command
from mlx_dora.layers import weight_of
from mlx_dora.matrix.weight import dense
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.fisher.information import Fisher, FisherFacts
from tests.adapters.training import QV, TOKENS
from tests.checks import assert_close, to_numpy
from tests.merge.names import NORMALIZED
from tests.merge.oracle import dense_karcher, dense_slerp

MakeModel = Callable[..., nn.Module]
MakeFolder = Callable[..., Path]


def train(
    model: nn.Module,
    seed: int,
    *,
    rank: int = 3,
    scale: float = 2.0,
    keys: tuple[str, ...] = QV,
    kind: str = "dora",
) -> Adapter:
    """A simulated trained adapter; the model is unchanged on return."""
    mx.random.seed(seed)
    config = DoRAConfig(rank=rank, scale=scale, num_layers=2, keys=keys)
    apply_layers(model, config, kind)  # pyright: ignore[reportArgumentType]
    for _, layer in adapter_layers(model):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.05 * mx.random.normal(layer.m.shape))
    adapter = take_adapter(model)
    mx.eval(adapter.tensors)
    remove_dora(model)
    return adapter


def known_of(
    model: nn.Module, adapters: list[Adapter], granularity: str = "row"
) -> list[Fisher]:
    """Random Fisher information of each adapter's modules."""
    result = []
    for seed, adapter in enumerate(adapters):
        rng = np.random.default_rng(seed)
        modules = dict(model.named_modules())
        tensors = {}
        for path in adapter.paths:
            shape = modules[path].weight.shape
            shape = shape if granularity == "element" else shape[:1]
            tensors[path] = mx.array(rng.uniform(1, 9, shape).astype(np.float32))
        facts = FisherFacts(
            granularity=granularity, labels="data", rows=1, tokens=1, norm=1.0 + seed
        )
        result.append(Fisher(facts, tensors))
    return result


def dense_rows(model: nn.Module, adapter: Adapter, path: str) -> np.ndarray:
    """W' of one linear layer in float64."""
    weight = weight_of(dict(model.named_modules())[path])
    base = to_numpy(dense(weight))
    if f"{path}.lora_a" not in adapter.tensors:
        return base
    a, b = (
        to_numpy(adapter.tensors[f"{path}.{leaf}"]) for leaf in ("lora_a", "lora_b")
    )
    rows = base + adapter.config.scale * (a @ b).T
    if f"{path}.m" not in adapter.tensors:
        return rows
    m = to_numpy(adapter.tensors[f"{path}.m"])
    return m[:, None] * rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("bits", [None, 4])
def test_merges_different_adapters_and_reports_it(
    make_tiny_model: MakeModel, bits
) -> None:
    model = make_tiny_model(bits=bits)
    adapters = [
        train(model, 1),
        train(model, 2, rank=5, scale=0.5, keys=(*QV, "mlp.down_proj")),
        train(model, 3, kind="lora", keys=("self_attn.q_proj",)),
    ]
    report = merge_adapters_report(adapters, model=model, method="karcher")
    merged = report.adapter
    for path in merged.paths:
        parts = [dense_rows(model, adapter, path) for adapter in adapters]
        assert_close(dense_rows(model, merged, path), dense_karcher(parts, [1 / 3] * 3))
    ranks = {layer.path: layer.rank for layer in report.layers}
    assert ranks["model.layers.0.self_attn.q_proj"] == 11
    assert ranks["model.layers.0.self_attn.v_proj"] == 8
    assert ranks["model.layers.1.mlp.down_proj"] == 5
    layer = "model.layers.1.mlp.down_proj: rank 5, in 1 of 3 adapters"
    assert layer in "\n".join(report.details())
    text = "\n".join(report.lines())
    assert layer not in text
    assert "Merged 3 adapters on 6 matrices by karcher: rank 5 to 11." in text


@pytest.mark.parametrize("method", NORMALIZED)
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_one_adapter_comes_back_bit_for_bit(
    tiny_model: nn.Module, tmp_path: Path, method: str, kind: str
) -> None:
    first, other = train(tiny_model, 1, kind=kind), train(tiny_model, 2)
    for inputs, weights in (([first], None), ([first, other], [0.3, 0.0])):
        merge_adapters(
            inputs,
            model=tiny_model,
            method=method,
            weights=weights,
            fisher=known_of(tiny_model, inputs) if method == "fisher" else None,
            save_path=tmp_path / "out",
            overwrite=True,
        )
        result = load_adapter(tmp_path / "out")
        assert result.config.scale == first.config.scale
        assert result.fine_tune_type == kind
        assert result.tensors.keys() == first.tensors.keys()
        for name, value in first.tensors.items():
            assert mx.array_equal(result.tensors[name], value)


def test_weights_by_pattern(tiny_model: nn.Module) -> None:
    adapters = [train(tiny_model, 1), train(tiny_model, 2)]
    weights = {"*.q_proj": [1, 3], "model.layers.0.*": [1, 0], "*": [0.5, 0.5]}
    merged = merge_adapters(adapters, model=tiny_model, weights=weights)
    for path, t in (
        ("model.layers.0.self_attn.q_proj", 0.75),
        ("model.layers.1.self_attn.v_proj", 0.5),
    ):
        parts = [dense_rows(tiny_model, adapter, path) for adapter in adapters]
        assert_close(
            dense_rows(tiny_model, merged, path), dense_slerp(parts[0], parts[1], t)
        )
    path = "model.layers.0.self_attn.v_proj.lora_a"  # a single adapter: unchanged
    assert mx.array_equal(merged.tensors[path], adapters[0].tensors[path])


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_fisher_weighs_adapters_by_their_information(
    tiny_model: nn.Module, granularity: str
) -> None:
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    known = known_of(tiny_model, adapters, granularity)
    report = merge_adapters_report(
        adapters,
        model=tiny_model,
        method="fisher",
        weights=[1, 3],
        fisher=known,
        rank=32 if granularity == "element" else None,
    )
    path = "model.layers.1.self_attn.q_proj"
    parts = [dense_rows(tiny_model, adapter, path) for adapter in adapters]
    shape = parts[0].shape
    f, g = (to_numpy(information.read(path, shape)) for information in known)  # pyright: ignore[reportArgumentType]
    if granularity == "row":
        f, g = f[:, None], g[:, None]
    truth = (f * parts[0] + 3 * g * parts[1]) / (f + 3 * g)
    assert_close(dense_rows(tiny_model, report.adapter, path), truth)
    assert "Fisher" not in "\n".join([*report.lines(), *report.details()])
    alone = [*known[:1], known_of(tiny_model, [train(tiny_model, 1, keys=QV[:1])],
                                  granularity)[0]]  # fmt: skip
    report = merge_adapters_report(
        adapters, model=tiny_model, method="fisher", fisher=alone
    )
    # The second has no information on v_proj: the plain mean, which is reported.
    line = next(
        line for line in report.details() if "layers.0.self_attn.v_proj" in line
    )
    assert "512 weights without Fisher information" in line
    assert "1024 weights have no Fisher information, in 2 matrices." in report.lines()
    path = "model.layers.1.self_attn.v_proj"
    parts = [dense_rows(tiny_model, adapter, path) for adapter in adapters]
    merged = dense_rows(tiny_model, report.adapter, path)
    assert_close(merged, (parts[0] + parts[1]) / 2)


def test_embeddings_merge_too(tiny_model: nn.Module) -> None:
    keys = ("model.embed_tokens",)
    adapters = [train(tiny_model, 1, keys=keys), train(tiny_model, 2, keys=keys)]
    merged = merge_adapters(adapters, model=tiny_model, method="slerp")
    base = to_numpy(tiny_model["model"]["embed_tokens"].weight)

    def rows(adapter: Adapter) -> np.ndarray:
        a, b, m = (
            to_numpy(adapter.tensors[f"model.embed_tokens.{leaf}"])
            for leaf in ("lora_a", "lora_b", "m")
        )
        full = base + adapter.config.scale * a @ b
        return m[:, None] * full / np.linalg.norm(full, axis=1, keepdims=True)

    assert_close(rows(merged), dense_slerp(rows(adapters[0]), rows(adapters[1]), 0.5))
    attach_adapter(tiny_model, merged)
    assert mx.isfinite(tiny_model(TOKENS)).all()


def test_refusals(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    model, packed = make_tiny_model(), make_tiny_model(bits=4)
    adapters = [train(model, 1), train(packed, 2)]
    with pytest.raises(DoRAError, match=r"adapter 2 does not fit .*tensors differ"):
        merge_adapters(adapters, model=model)
    merged = merge_adapters(adapters, model=model, check_base=False)
    assert merged.base.fingerprint is None
    first = adapters[0]
    (tmp_path / "out").mkdir()
    full = Adapter(config=first.config, tensors=first.tensors, fine_tune_type="full")
    spoilt = {**first.tensors, next(iter(first.tensors)): mx.array([float("nan")])}
    cases: list[tuple[list[Adapter], dict[str, Any], str]] = [
        ([], {}, "at least one"),
        ([first] * 3, {}, "slerp merges at most 2 inputs, got 3"),
        ([first], {"method": "mean"}, "no merge method 'mean'"),
        ([first], {"rank": 0}, "rank must be"),
        ([first, first], {"weights": [1.0]}, "expected 2, one for each input"),
        ([first, first], {"weights": [1.0, float("nan")]}, "a finite number, or one"),
        ([first, first], {"weights": [0, 0]}, "positive sum"),
        ([first, first], {"weights": [2, -1]}, "at least 0"),
        ([first, first], {"weights": {"*.q_proj": [1, 1]}}, "no pattern matches"),
        ([first, first], {"weights": [1, mx.ones(3)]}, "one per row"),
        ([first], {"save_path": tmp_path / "out"}, "already exists"),
        ([first, first], {"method": "dare", "seed": -1}, "seed must be a whole number"),
        (
            [first, first],
            {"method": "dare", "seed": 2**64},
            "seed must be a whole number",
        ),
        (
            [first, first],
            {"method": "ties", "scale": float("nan")},
            "scale must be a fin",
        ),
        ([full], {}, "fully fine-tuned"),
        ([Adapter(config=first.config, tensors=spoilt)], {}, "NaN"),
    ]
    for inputs, kw, message in cases:
        with pytest.raises(DoRAError, match=message):
            merge_adapters(inputs, model=model, **kw)


def test_the_command_writes_what_mlx_lm_loads(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    base = make_tiny_folder("base")
    model, _ = load(base)
    for seed in (1, 2):
        single = train(model, seed)
        save_adapter(single, tmp_path / f"a{seed}", base_model=str(base))
    inputs = [str(tmp_path / f"a{seed}") for seed in (1, 2)]
    out = tmp_path / "out"
    args = ["adapters", *inputs, "--save-path", str(out), "--weights", "1,2"]
    result = CliRunner().invoke(command, [*args, "--rank", "4", "-v"])
    assert result.exit_code == 0, result.output
    assert "of the energy cut" in result.stderr
    assert "The rank cut at most " in result.stdout
    assert f"Saved to {out}" in result.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4
    assert config["mlx_dora"]["training"]["merged"]["adapters"] == inputs
    from mlx_lm import load as host_load

    theirs = host_load(str(base), adapter_path=str(out))[0]
    ours, _ = load(base, out)
    assert mx.allclose(theirs(TOKENS), ours(TOKENS), atol=1e-5)
    again = CliRunner().invoke(command, [*args, "-q"])
    assert again.exit_code == 1
    assert again.stderr.count("\n") == 1
    assert "already exists" in again.stderr
    assert CliRunner().invoke(command, ["adapters", *inputs]).exit_code == 2
    patterns = [*args[:-1], "{'*.q_proj': [1, 0], '*': [1, 3]}", "--overwrite"]
    assert CliRunner().invoke(command, patterns).exit_code == 0
    saved, first = load_adapter(out), load_adapter(inputs[0])
    path = "model.layers.1.self_attn.q_proj.lora_a"
    assert mx.array_equal(saved.tensors[path], first.tensors[path])
    assert saved.tensors[path.replace("q_proj", "v_proj")].shape[1] == 6
    bad = [*args[:-1], "1,x: ["]
    assert CliRunner().invoke(command, bad).exit_code == 2


@pytest.mark.parametrize("is_opposed", [False, True])
def test_auto_uses_the_suggestion_of_the_comparison(
    make_tiny_folder: MakeFolder, tmp_path: Path, is_opposed: bool
) -> None:
    base = make_tiny_folder("base")
    model, _ = load(base)
    first = train(model, seed=1, scale=0.01)  # small updates
    second = train(model, seed=1 if is_opposed else 2, scale=0.01)
    if is_opposed:
        flipped = {
            name: -value if name.endswith("lora_b") else value
            for name, value in second.tensors.items()
        }
        second = replace(second, tensors=flipped)
    for name, adapter in (("one", first), ("two", second)):
        save_adapter(adapter, tmp_path / name)
    result = CliRunner().invoke(
        command,
        ["adapters", str(tmp_path / "one"), str(tmp_path / "two"), "--method", "auto",
         "--model", str(base), "--save-path", str(tmp_path / "out")],
    )  # fmt: skip
    if is_opposed:
        assert result.exit_code == 1
        assert "name a --method" in result.output
        assert not (tmp_path / "out").exists()
    else:
        assert result.exit_code == 0, result.output
        chosen = result.output.partition("Method: ")[2].splitlines()[0]
        assert chosen == INDEPENDENT
        summed = merge_adapters(
            [first, second],
            model=model,
            method=chosen,
            weights=[1.0, 1.0],
            space=SPACE,
        )
        saved = load_adapter(tmp_path / "out")
        assert all(
            mx.array_equal(saved.tensors[name], value)
            for name, value in summed.tensors.items()
        )
