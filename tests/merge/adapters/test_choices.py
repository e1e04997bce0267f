"""Spaces, rules for magnitudes and calibration with whole adapters."""

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

from mlx_dora import Adapter, DoRAError, load_adapter, save_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.cli.merge import command
from mlx_dora.layers import weight_of
from mlx_dora.merge import merge_adapters
from mlx_dora.merge.adapters.dense import Options
from mlx_dora.merge.adapters.merge import merge_adapters_report
from mlx_dora.merge.methods import METHODS
from mlx_dora.merge.methods.magnitudes import RULES
from mlx_dora.merge.methods.spaces import SPACES
from mlx_dora.merge.methods.table import names_in_spaces
from tests.adapters.stacks import EXPERTS, dense_stack, make_adapter, make_model
from tests.adapters.training import QV
from tests.checks import assert_close, to_numpy
from tests.merge.adapters.test_laws import PATHS, assert_same, settings, weighed
from tests.merge.adapters.test_merge import dense_rows, known_of, train
from tests.merge.methods.test_coordinates import FACTORED
from tests.merge.names import ALL, CHOOSING, NORMALIZED, RANDOM, UNNORMALIZED, most

MakeModel = Callable[..., nn.Module]
MakeFolder = Callable[..., Path]
CROSSED = [(space, method) for space in FACTORED for method in names_in_spaces()]
FULL = 32  # rank of every matrix here
GATE = "model.layers.1.mlp.switch_mlp.gate_proj"


def rank_for(space: str, rank: int | None = None) -> int | None:
    return FULL if SPACES[space].needs_rank and rank is None else rank


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("space", "method"), CROSSED)
def test_copies_give_the_adapter_back(
    make_tiny_model: MakeModel, space: str, method: str, count: int, bits: int | None
) -> None:
    if method in CHOOSING or most(method, count) < count:
        pytest.skip("no copy comes back, or takes one adapter")
    model = make_tiny_model(bits=bits)
    first = train(model, 1)
    share = 1.0 if METHODS[method].density == 0.2 or "ties" in method else 1 / count
    share = 1.0 if method == "della" else share
    weights = [share] * count
    if method == "breadcrumbs_ties":
        weights = [1 / count] * count
    if method == "tsv":  # two equal tasks are whitened, so differ from one
        weights = [1.0] + [0.0] * (count - 1)
        if count > 1 and space == "ctm":
            pytest.skip("of the 3 singular vectors in the space tsv keeps 3 / N")
    copies = [first] * count
    kw = {**settings(method, model, copies), **weighed(method, weights)}
    for rank in (None, 3):
        merged = merge_adapters(copies, space=space, rank=rank_for(space, rank), **kw)
        assert merged.config.rank == 3  # copies add no rank
        assert_same(model, merged, first, 1e-6)


@pytest.mark.parametrize(("space", "method"), CROSSED)
def test_the_order_of_the_adapters_does_not_matter(
    tiny_model: nn.Module, space: str, method: str
) -> None:
    if method in RANDOM or most(method, 3) < 3:
        pytest.skip("random numbers depend on the position, or takes one adapter")
    adapters = [train(tiny_model, i, rank=2 + i) for i in range(3)]
    weights = [0.2, 0.3, 0.5]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL, "space": space}
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        kw["density"] = 0.4
    first = merge_adapters(adapters, **kw, **weighed(method, weights))
    other = merge_adapters(adapters[::-1], **kw, **weighed(method, weights[::-1]))
    assert_same(tiny_model, first, other, 1e-5 if method == "tsv" else 1e-6)


@pytest.mark.parametrize("space", FACTORED)
@pytest.mark.parametrize("method", [*UNNORMALIZED, "iso"])
def test_the_weights_of_a_sum_scale_the_change(
    tiny_model: nn.Module, space: str, method: str
) -> None:
    adapters = [train(tiny_model, i) for i in (1, 2)]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL, "space": space}
    kw["magnitudes"] = "base"  # of which iso takes the mean
    first = merge_adapters(adapters, weights=[0.3, 0.7], scale=2.0, **kw)
    other = merge_adapters(adapters, weights=[0.6, 1.4], **kw)
    assert_same(tiny_model, first, other, 1e-5)


@pytest.mark.parametrize("space", FACTORED)
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_the_size_of_the_weights_of_a_mean_does_not_matter(
    tiny_model: nn.Module, space: str, method: str
) -> None:
    adapters = [train(tiny_model, i) for i in (1, 2)]
    kw = {**settings(method, tiny_model, adapters), "rank": FULL, "space": space}
    first, other = (
        merge_adapters(adapters, weights=[size * w for w in (0.3, 0.7)], **kw)
        for size in (1, 10)
    )
    assert_same(tiny_model, first, other, 1e-6)


def norms(model: nn.Module, adapter: Adapter, path: str) -> np.ndarray:
    return np.linalg.norm(dense_rows(model, adapter, path), axis=1)


@pytest.mark.parametrize("method", [m for m in ALL if METHODS[m].inputs != (1, 1)])
def test_every_method_takes_every_rule_for_magnitudes(
    tiny_model: nn.Module, method: str
) -> None:
    """The directions are those of the method, the lengths those of the rule."""
    pair = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    kw = {**settings(method, tiny_model, pair), "rank": FULL}
    plain = merge_adapters(pair, **kw)
    nothing = Adapter(config=pair[0].config, tensors={})
    for path in PATHS:
        base = norms(tiny_model, nothing, path)
        moved = np.stack([norms(tiny_model, one, path) - base for one in pair])
        furthest = np.take_along_axis(moved, np.abs(moved).argmax(0)[None], 0)[0]
        truths = {"mean": base + moved.mean(0), "mover": base + furthest, "base": base}
        for rule, truth in truths.items():
            merged = merge_adapters(pair, magnitudes=rule, **kw)
            assert_close(norms(tiny_model, merged, path), truth, bound=1e-5)
            rows, other = (dense_rows(tiny_model, a, path) for a in (merged, plain))
            size = np.linalg.norm(other, axis=1, keepdims=True)
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            assert_close(unit, other / size, bound=1e-4)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("method", ["nmean", "task_arithmetic", "ties", "fisher"])
def test_own_lengths_are_those_of_the_final_direction(
    tiny_model: nn.Module, method: str, rank: int | None
) -> None:
    """So that W' = W0 + sBA, after a cut and a calibration too."""
    pair = [train(tiny_model, 1), train(tiny_model, 2, rank=5)]
    kw = {**settings(method, tiny_model, pair), "rank": rank, "magnitudes": "own"}
    for calibrate in (None, "pico"):
        merged = merge_adapters(pair, calibrate=calibrate, **kw)
        for path in PATHS:
            weight = weight_of(dict(tiny_model.named_modules())[path])
            assert isinstance(weight, mx.array)
            a, b = (
                to_numpy(merged.tensors[f"{path}.{leaf}"])
                for leaf in ("lora_a", "lora_b")
            )
            truth = to_numpy(weight) + merged.config.scale * (a @ b).T
            assert_close(dense_rows(tiny_model, merged, path), truth, bound=1e-6)


def test_the_base_rule_undoes_magnitudes_of_a_single_adapter(
    tiny_model: nn.Module,
) -> None:
    first = train(tiny_model, 1)
    merged = merge_adapters([first], model=tiny_model, method="nmean",
                            magnitudes="base")  # fmt: skip
    nothing = Adapter(config=first.config, tensors={})
    for path in PATHS:
        assert_close(merged.tensors[f"{path}.m"], norms(tiny_model, nothing, path))


@pytest.mark.parametrize("method", [m for m in NORMALIZED if m != "fisher"])
def test_a_single_adapter_is_not_calibrated(tiny_model: nn.Module, method: str) -> None:
    first, other = train(tiny_model, 1), train(tiny_model, 2)
    merged = merge_adapters([first, other], model=tiny_model, method=method,
                            weights=[1.0, 0.0], calibrate="pico")  # fmt: skip
    for name, value in first.tensors.items():
        assert mx.array_equal(merged.tensors[name], value)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("space", FACTORED)
def test_experts_are_merged_in_a_space_of_their_own(
    space: str, bits: int | None
) -> None:
    model = make_model("qwen3_moe", bits)
    keys = EXPERTS["qwen3_moe"]
    adapters = [
        make_adapter(model, 1, keys),
        make_adapter(model, 2, keys[:1], rank=5, scale=0.5),
        make_adapter(model, 3, keys[:1], kind="lora"),
    ]
    rank = rank_for(space, 6 if space == "ctm" else None)
    merged = merge_adapters(
        adapters, model=model, method="ties", space=space, rank=rank, density=1.0
    )
    stack = dense_stack(model, merged, GATE)
    assert np.isfinite(stack).all()
    for index in range(2):  # each expert alone gives the same matrix
        alone = [
            replace(
                adapter,
                tensors={
                    name: mx.concatenate([value[index : index + 1]] * len(value))
                    for name, value in adapter.tensors.items()
                },
            )
            for adapter in adapters
        ]
        other = merge_adapters(
            alone, model=model, method="ties", space=space, rank=rank, density=1.0,
        )  # fmt: skip
        assert_close(dense_stack(model, other, GATE)[index], stack[index], bound=1e-6)
    attach_adapter(model, merged)  # the merged config matches the model


@pytest.mark.parametrize("space", FACTORED)
def test_embeddings_and_modules_of_one_adapter(
    tiny_model: nn.Module, space: str
) -> None:
    keys = (*QV, "model.embed_tokens")
    adapters = [train(tiny_model, 1), train(tiny_model, 2, rank=5, keys=keys)]
    report = merge_adapters_report(
        adapters,
        model=tiny_model,
        method="ties",
        rank=rank_for(space),
        options=Options(density=1.0, space=space),
    )
    path = "model.embed_tokens"
    a, b, m = (
        to_numpy(report.adapter.tensors[f"{path}.{leaf}"])
        for leaf in ("lora_a", "lora_b", "m")
    )
    update = (
        adapters[1].config.scale
        * to_numpy(adapters[1].tensors[f"{path}.lora_a"])
        @ to_numpy(adapters[1].tensors[f"{path}.lora_b"])
    )
    # The one adapter that has it keeps its update: the other changes nothing.
    assert_close(report.adapter.config.scale * a @ b, update, bound=1e-6)
    assert_close(m, to_numpy(adapters[1].tensors[f"{path}.m"]), bound=1e-6)
    (layer,) = [layer for layer in report.layers if layer.path == path]
    assert (layer.inputs, layer.rank) == (1, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"space": "core"}, "space core has no effect on slerp; it is for task_arith"),
        ({"space": "core", "method": "arcee_fusion"}, "no effect on arcee_fusion"),
        ({"space": "ctm", "method": "ties"}, "space ctm needs the rank of the result"),
        ({"space": "warp", "method": "ties"}, "no space 'warp': weight, core, knots"),
        ({"magnitudes": "best"}, "no rule for magnitudes 'best': mean, mover, ties"),
        ({"calibrate": "warm"}, "no calibration 'warm': pico."),
        ({"magnitudes": "mean", "density": 0.2}, "density has no effect on slerp"),
    ],
)
def test_bad_choices_are_refused_in_a_line(
    tiny_model: nn.Module, given: dict[str, Any], message: str
) -> None:
    count = most(given.get("method", "slerp"), 2)
    adapters = [train(tiny_model, i) for i in range(count)]
    with pytest.raises(DoRAError, match=message) as caught:
        merge_adapters(adapters, model=tiny_model, **given)
    assert "\n" not in str(caught.value)


def test_a_space_of_a_rank_has_no_cut_to_measure(tiny_model: nn.Module) -> None:
    with pytest.raises(DoRAError, match="space ctm makes none: leave logit_error out"):
        merge_adapters_report(
            [train(tiny_model, 1)],
            model=tiny_model,
            method="ties",
            rank=2,
            options=Options(space="ctm"),
            probe="data",
        )


def test_the_rule_ties_takes_a_density_with_any_method(tiny_model: nn.Module) -> None:
    pair = [train(tiny_model, i) for i in (1, 2)]
    kw: dict[str, Any] = {"model": tiny_model, "magnitudes": "ties"}
    few, many = (merge_adapters(pair, density=share, **kw) for share in (0.1, 1.0))
    nothing = Adapter(config=pair[0].config, tensors={})
    base = norms(tiny_model, nothing, PATHS[0])
    kept = [
        (np.abs(to_numpy(one.tensors[f"{PATHS[0]}.m"]) - base) > 1e-5).sum()
        for one in (few, many)
    ]
    assert kept[0] <= 6 < 20 < kept[1]


def test_rules_weigh_by_element_fisher_as_given(tiny_model: nn.Module) -> None:
    """By row, this is part of the test of every method."""
    pair = [train(tiny_model, i) for i in (1, 2)]
    merged = merge_adapters(
        pair, model=tiny_model, method="fisher", magnitudes="mean", rank=FULL,
        fisher=known_of(tiny_model, pair, "element"),
    )  # fmt: skip
    lengths = [norms(tiny_model, one, PATHS[0]) for one in pair]
    truth = np.mean(lengths, axis=0)
    assert_close(norms(tiny_model, merged, PATHS[0]), truth, bound=1e-5)


def test_the_command_records_and_reports_the_choices(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    from mlx_dora.adapters.hosting import load

    folder = make_tiny_folder("base")
    model, _ = load(folder)
    for i in (1, 2):
        save_adapter(train(model, i), tmp_path / f"a{i}")
    arguments = [
        "adapters", str(tmp_path / "a1"), str(tmp_path / "a2"), "--model", str(folder),
        "--save-path", str(tmp_path / "out"), "--method", "ties", "--space", "core",
        "--magnitudes", "mover", "--calibrate", "pico",
        "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    line = "by ties (space core, magnitudes mover, calibrate pico): rank "
    assert line in result.output
    facts = json.loads((tmp_path / "out.json").read_text())
    chosen = {"space": "core", "magnitudes": "mover", "calibrate": "pico"}
    assert facts["settings"] == chosen
    training = load_adapter(tmp_path / "out").training
    assert training is not None
    recorded = training["merged"]
    assert {name: recorded[name] for name in chosen} == chosen


def test_help_says_what_each_choice_is() -> None:
    text = " ".join(CliRunner().invoke(command, ["adapters", "--help"]).output.split())
    for name, entry in {**SPACES, **RULES}.items():
        assert f"{name} ({entry.summary.split('(')[0]}".strip() in text
