"""Cases whose answers are known without computation."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAConfig, apply_dora, save_adapter
from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.surgery import remove_dora
from mlx_dora.analyze import (
    DoRADecomposition,
    analyze_adapter,
    analyze_finetune,
    compare_adapters,
)
from mlx_dora.analyze.guidance import INDEPENDENT, STRONG
from mlx_dora.errors import DoRAError
from mlx_dora.io.header import read_header

PATH = "model.layers.0.self_attn.q_proj"


def weights(seed: int = 0, rows: int = 64, width: int = 32) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal((rows, width)).astype(np.float32)
    return {"layers.0.q_proj.weight": mx.array(draw), "norm.weight": mx.ones(width)}


def change(base, function):
    return {k: function(v) if v.ndim == 2 else v for k, v in base.items()}


def only(analysis):
    (layer,) = analysis.layers
    return layer


def test_twice_the_weight_is_magnitude_alone():
    base = weights()
    result = only(analyze_finetune(base, change(base, lambda w: 2 * w)))
    norm = np.linalg.norm(np.array(base["layers.0.q_proj.weight"], np.float64), axis=1)
    assert (result.rows, result.layer, result.module) == (64, 0, "q_proj")
    assert result.delta_m == pytest.approx(norm.mean(), rel=1e-7)
    assert result.delta_m_relative == pytest.approx(1, rel=1e-7)
    assert result.delta_d < 1e-14
    assert result.radial_share == pytest.approx(1)
    assert result.classification == "amplified"
    assert np.isnan(result.correlation) or result.row_angle.max() < 1e-7


def test_stacks_are_passed_over_by_name(caplog):
    base = weights() | {"experts.weight": mx.ones((3, 4, 5))}
    result = analyze_finetune(base, change(base, lambda w: 2 * w))
    assert [layer.name for layer in result.layers] == ["layers.0.q_proj"]
    assert "skipped, not matrices: experts.weight" in caplog.text


def test_half_the_weight_is_attenuated():
    base = weights()
    result = analyze_finetune(base, change(base, lambda w: 0.5 * w))
    assert result.classification == {"layers.0.q_proj": "attenuated"}
    assert result.guidance[0].rule == "magnitude"


def test_rotated_rows_are_direction_alone():
    base = weights()
    turn = np.eye(32)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    for i in range(2, 32, 2):
        turn[i : i + 2, i : i + 2] = turn[:2, :2]
    rotation = mx.array(turn.astype(np.float32))
    result = only(analyze_finetune(base, change(base, lambda w: w @ rotation)))
    np.testing.assert_allclose(result.row_angle, 0.3, rtol=1e-6)
    assert result.delta_d == pytest.approx(1 - np.cos(0.3), rel=1e-6)
    assert result.delta_m_relative < 1e-6
    assert result.radial_share < 1e-12
    assert result.classification == "rotated"


def test_identical_weights_did_nothing():
    base = weights()
    result = analyze_finetune(base, base, spectrum=True)
    assert (result.layers, result.unchanged) == ([], ["layers.0.q_proj"])
    assert np.isnan(result.correlation)
    assert result.guidance[0].rule == "unchanged"
    json.dumps(result.to_dict(), allow_nan=False)


def test_spectrum_of_two_checkpoints_is_the_svd():
    base, other = weights(0), weights(1)
    for flip in (False, True):
        pair = [change(w, lambda v, f=flip: v.T if f else v) for w in (base, other)]
        result = only(analyze_finetune(*pair, spectrum=True))
        delta = np.array(other["layers.0.q_proj.weight"], np.float64)
        delta = delta - np.array(base["layers.0.q_proj.weight"])
        expected = np.linalg.svd(delta, compute_uv=False)
        np.testing.assert_allclose(result.singular_values[:32], expected, rtol=1e-9)
        share = expected**2 / (expected**2).sum()
        rank = np.exp(-(share * np.log(share)).sum())
        assert result.effective_rank == pytest.approx(rank, rel=1e-9)


def test_decompose_gives_lengths_and_unit_rows():
    base = weights()
    result = DoRADecomposition().decompose(base)
    name = "layers.0.q_proj.weight"
    assert list(result.magnitudes) == list(result.directions) == [name]
    norm = np.linalg.norm(np.array(base[name], np.float64), axis=1)
    np.testing.assert_allclose(np.array(result.magnitudes[name]), norm, rtol=1e-6)
    rebuilt = result.magnitudes[name][:, None] * result.directions[name]
    assert mx.allclose(rebuilt, base[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_folders_give_what_arrays_give(tmp_path, dtype):
    base = {k: v.astype(dtype) for k, v in weights(0, 5000).items()}
    tuned = change(base, lambda w: (w * 1.25).astype(dtype))
    folders = []
    for name, tensors in (("a", base), ("b", tuned)):
        folder = tmp_path / name
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        assert read_header(folder / "model.safetensors")
        folders.append(folder)
    result = only(DoRADecomposition().analyze_adaptation(*folders))
    expected = only(DoRADecomposition().analyze_adaptation(base, tuned))
    np.testing.assert_array_equal(result.row_delta_m, expected.row_delta_m)
    np.testing.assert_array_equal(result.row_angle, expected.row_angle)
    assert result.delta_m_relative == pytest.approx(0.25, rel=1e-2)


def adapted(model, *, change_m=1.0, rows=None, seed=0, sign=1.0, size=1.0) -> Adapter:
    """Return an adapter of q_proj that looks trained; `model` stays plain."""
    apply_dora(
        model, DoRAConfig(rank=4, scale=1.5, keys=("self_attn.q_proj",), num_layers=-1)
    )
    adapter = take_adapter(model)
    remove_dora(model)
    rng = np.random.default_rng(seed)
    tensors = dict(adapter.tensors)
    for name, value in adapter.tensors.items():
        if name.endswith("lora_b"):
            draw = 0.05 * size * sign * rng.standard_normal(value.shape)
            if rows is not None:
                draw[:, [j for j in range(value.shape[1]) if j not in rows]] = 0
            tensors[name] = mx.array(draw.astype(np.float32))
        if name.endswith(".lora_a"):
            draw = np.random.default_rng(7).standard_normal(value.shape)
            tensors[name] = mx.array(draw.astype(np.float32))
        if name.endswith(".m"):
            tensors[name] = value * change_m
    return Adapter(config=adapter.config, tensors=tensors, base=adapter.base)


@pytest.mark.parametrize("bits", [None, 4])
def test_adapter_equals_the_dense_weights(make_tiny_model, bits):
    model = make_tiny_model(bits=bits)
    result = analyze_adapter(adapted(model, change_m=1.1), model)
    module = dict(model.named_modules())[PATH]
    base = module.weight
    if bits:
        base = mx.dequantize(base, module.scales, module.biases, 32, bits)
    tensors = adapted(model, change_m=1.1).tensors
    a, b, m = (tensors[f"{PATH}.{leaf}"] for leaf in ("lora_a", "lora_b", "m"))
    delta = 1.5 * (np.array(a, np.float64) @ np.array(b, np.float64)).T
    direction = np.array(base, np.float64) + delta
    scale = np.array(m, np.float64) / np.linalg.norm(direction, axis=1)
    dense = {f"{PATH}.weight": mx.array((scale[:, None] * direction).astype("f"))}
    expected = only(analyze_finetune({f"{PATH}.weight": base}, dense))
    layer = next(x for x in result.layers if x.name == PATH)
    np.testing.assert_allclose(layer.row_angle, expected.row_angle, rtol=1e-5)
    np.testing.assert_allclose(layer.row_delta_m, expected.row_delta_m, rtol=1e-5)
    values = np.linalg.svd(delta, compute_uv=False)[:4]
    np.testing.assert_allclose(layer.singular_values, values, rtol=1e-7)
    assert len(result.layers) == 2
    json.dumps(result.to_dict(), allow_nan=False)


def test_lora_differs_from_dora_in_length_only(tiny_model):
    dora = adapted(tiny_model)
    tensors = {k: v for k, v in dora.tensors.items() if not k.endswith(".m")}
    lora = Adapter(config=dora.config, tensors=tensors, fine_tune_type="lora")
    with_m = analyze_adapter(dora, tiny_model).layers[0]
    without = analyze_adapter(lora, tiny_model).layers[0]
    np.testing.assert_array_equal(with_m.row_angle, without.row_angle)
    assert with_m.delta_m_relative < 1e-7  # m was left at ‖W0‖
    assert without.delta_m_relative > 1e-2


def test_an_adapter_agrees_with_itself(tiny_model):
    adapter = adapted(tiny_model)
    result = compare_adapters([adapter, adapter], tiny_model)
    assert len(result.layers) == 2
    for pair in result.pairs:
        assert pair.update_cosine == pytest.approx(1)
        assert pair.direction_cosine == pytest.approx(1)
        assert pair.input_overlap == pytest.approx(1)
        assert pair.disturbs_first == pytest.approx(1)
        assert pair.sign_conflict == 0
    assert result.guidance[0].rule == "agree"
    assert (result.guidance[0].method, result.guidance[0].weights) == (
        "slerp",
        (0.5,) * 2,
    )
    assert result.ranks[PATH] <= 4
    assert not result.conflicts


def test_disjoint_rows_are_independent(tiny_model):
    low, high = set(range(16)), set(range(16, 32))
    pair = [
        adapted(tiny_model, rows=low, size=0.01),
        adapted(tiny_model, rows=high, seed=1, size=0.01),
    ]
    result = compare_adapters(pair, tiny_model)
    base = np.linalg.norm(np.array(dict(tiny_model.named_modules())[PATH].weight))
    norms = [
        np.linalg.norm(1.5 * np.array(a.tensors[f"{PATH}.lora_a"], np.float64)
                       @ np.array(a.tensors[f"{PATH}.lora_b"], np.float64))
        for a in pair
    ]  # fmt: skip
    size = np.sqrt(norms[0] * norms[1]) / base
    assert result.pairs[0].relative_size == pytest.approx(size, rel=1e-5)
    assert size < STRONG
    assert result.pairs[0].update_cosine == 0
    assert result.pairs[0].output_overlap == pytest.approx(0, abs=1e-12)
    assert (result.pairs[0].row_update_cosine == 0).all()
    advice = result.guidance[0]
    assert (advice.rule, advice.method) == ("independent", INDEPENDENT)
    assert advice.weights == (1.0, 1.0)


def test_opposite_signs_conflict(tiny_model):
    pair = [
        adapted(tiny_model, change_m=1.2),
        adapted(tiny_model, change_m=0.8, sign=-1.0),
    ]
    result = compare_adapters(pair, tiny_model)
    assert result.pairs[0].update_cosine == pytest.approx(-1)
    assert result.pairs[0].sign_conflict == 1
    assert [advice.rule for advice in result.guidance[:2]] == ["opposed", "magnitudes"]
    assert result.guidance[0].method is None
    assert len(result.conflicts) == 2
    json.dumps(result.to_dict(), allow_nan=False)


def test_interference_on_real_inputs_is_the_ratio_of_outputs(tiny_model):
    pair = [adapted(tiny_model), adapted(tiny_model, seed=3)]
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    result = compare_adapters(pair, tiny_model, activations={PATH: mx.array(x)})
    outputs = [
        np.linalg.norm(x @ np.array(adapter.tensors[f"{PATH}.lora_a"], np.float64)
                       @ np.array(adapter.tensors[f"{PATH}.lora_b"], np.float64))
        for adapter in pair
    ]  # fmt: skip
    assert result.pairs[0].disturbs_first == pytest.approx(outputs[1] / outputs[0])


def test_ranks_go_where_the_energy_is(tiny_model):
    adapter = adapted(tiny_model)
    tensors = dict(adapter.tensors)
    name = f"{PATH}.lora_b"
    keep = mx.array([[1.0], [0.0], [0.0], [0.0]])
    tensors[name] = tensors[name] * keep
    result = analyze_adapter(
        Adapter(config=adapter.config, tensors=tensors), tiny_model
    )
    pattern = result.rank_pattern(2)
    other = PATH.replace("layers.0", "layers.1")
    assert pattern == {PATH: 1, other: 3}
    assert result.layers[0].effective_rank == pytest.approx(1)
    with pytest.raises(DoRAError, match="at least 1"):
        result.rank_pattern(0.5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nan", "NaN or inf in"),
        ("shape", "the model needs"),
        ("base", "does not record its base"),
        ("folder", "not an adapter folder"),
        ("other", "it was trained on"),
    ],
)
def test_bad_adapters_raise_a_clear_message(make_tiny_model, tmp_path, damage, message):
    model = make_tiny_model()
    original = adapted(model)
    tensors = dict(original.tensors)
    if damage == "nan":
        tensors[f"{PATH}.m"] = tensors[f"{PATH}.m"] * float("nan")
    if damage == "shape":
        model = make_tiny_model(hidden_size=64)
    if damage == "other":
        model = make_tiny_model(seed=1)
    adapter = Adapter(config=original.config, tensors=tensors, base=original.base)
    given = tmp_path / "none" if damage == "folder" else adapter
    with pytest.raises(DoRAError, match=message) as error:
        analyze_adapter(given, None if damage == "base" else model)
    assert "\n" not in str(error.value)


def test_mismatched_models_raise_a_clear_message():
    base = weights()
    with pytest.raises(DoRAError, match="lacks"):
        analyze_finetune(base, {"x": mx.ones((2, 2))})
    with pytest.raises(DoRAError, match="has shape"):
        analyze_finetune(base, weights(rows=3))
    with pytest.raises(DoRAError, match="NaN"):
        analyze_finetune(base, change(base, lambda w: w * float("nan")))


def test_the_command_writes_table_json_and_report(make_tiny_folder, tmp_path):
    from click.testing import CliRunner

    from mlx_dora import load
    from mlx_dora.cli.analyze import command

    folder = make_tiny_folder()
    save_adapter(adapted(load(folder)[0]), tmp_path / "a", base_model=str(folder))
    out, page = tmp_path / "a.json", tmp_path / "a.html"
    flags = ["--json", str(out), "--report", str(page)]
    done = CliRunner().invoke(command, ["adapter", str(tmp_path / "a"), *flags])
    assert done.exit_code == 0, done.output
    assert "ΔM with ΔD over matrices" in done.output
    content = json.loads(out.read_text())
    assert (content["schema"], content["version"]) == ("mlx_dora.analysis", 1)
    assert content["kind"] == "adapter"
    assert {"name", "delta_m", "delta_d", "correlation"} <= set(content["layers"][0])
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    again = CliRunner().invoke(command, ["adapter", str(tmp_path / "a"), *flags])
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    both = ["compare", str(tmp_path / "a"), str(tmp_path / "a")]
    done = CliRunner().invoke(command, both)
    assert done.exit_code == 0, done.output
    assert "+1.000" in done.output
    done = CliRunner().invoke(command, ["models", str(folder), str(folder)])
    assert done.exit_code == 0, done.output
    assert "equal in both models and left out" in done.output
