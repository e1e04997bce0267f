"""Merges of whole model folders."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora import DoRAError
from mlx_dora.adapters.hosting import load
from mlx_dora.cli.merge import command
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge import merge_models
from mlx_dora.merge.fisher.information import FisherFacts, save_fisher
from mlx_dora.merge.methods import METHODS, blockwise
from mlx_dora.merge.models.merge import run_merge
from mlx_dora.merge.models.plan import plan_models
from tests.adapters.training import TOKENS
from tests.checks import assert_close, to_numpy
from tests.merge.names import ALL, CHOOSING, UNNORMALIZED, most, needed
from tests.merge.oracle import dense_karcher, dense_slerp, total

MakeFolder = Callable[..., Path]
MATRIX = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def read(folder: Path, name: str) -> np.ndarray:
    return to_numpy(Checkpoint(folder).tensor(name))


def edit(folder: Path, **changes: Any) -> None:
    path = str(folder / "model.safetensors")
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = value
    mx.save_safetensors(path, tensors, {"format": "mlx"})


@pytest.fixture
def three(make_tiny_folder: MakeFolder) -> list[Path]:
    """Three models with different weights, including norm weights."""
    folders = [make_tiny_folder(f"m{seed}", seed=seed) for seed in range(3)]
    for i, folder in enumerate(folders):
        edit(folder, model__norm__weight=(1.0 + i) * mx.ones(32))
    return folders


def test_rows_are_merged_apart_and_vectors_by_the_mean(
    three: list[Path], tmp_path: Path
) -> None:
    merge_models(three[:2], save_path=tmp_path / "out", weights=[1, 3])
    a, b = (read(folder, MATRIX) for folder in three[:2])
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), dense_slerp(a, b, 0.75))
    assert read(tmp_path / "out", "model.norm.weight")[0] == pytest.approx(1.75)
    model, tokenizer = load(tmp_path / "out")
    assert mx.isfinite(model(TOKENS)).all()
    assert tokenizer.encode("the fox")


def test_weights_by_pattern_and_by_row(three: list[Path], tmp_path: Path) -> None:
    t = np.linspace(0, 1, 32)
    weights = {"*.layers.1.mlp.down_proj": [1 - t, t], "*.layers.0.*": [1, 0],
               "*": [1, 3]}  # fmt: skip
    merge_models(three[:2], save_path=tmp_path / "out", weights=weights)
    a, b = (read(folder, MATRIX) for folder in three[:2])
    rows = [dense_slerp(a[[j]], b[[j]], t[j])[0] for j in range(32)]
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), np.array(rows))
    for name, share in (("layers.0.mlp.up_proj", 0.0), ("layers.1.mlp.up_proj", 0.75)):
        a, b = (read(folder, f"model.{name}.weight") for folder in three[:2])
        expected = dense_slerp(a, b, share) if share else a
        assert_close(mx.array(read(tmp_path / "out", f"model.{name}.weight")), expected)


def test_changes_of_a_base_are_merged_when_there_is_one(
    three: list[Path], tmp_path: Path
) -> None:
    base, *tuned = three
    merge_models(tuned, base=base, method="karcher", save_path=tmp_path / "out")
    start = read(base, MATRIX)
    moved = [read(folder, MATRIX) - start for folder in tuned]
    expected = start + dense_karcher(moved, [0.5, 0.5])
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), expected)


def known_of(folder: Path, count: int, granularity: str = "row") -> list[Path]:
    """Folders of random Fisher information of one matrix."""
    shape = (32, 64) if granularity == "element" else (32,)
    facts = FisherFacts(
        granularity=granularity, labels="data", rows=1, tokens=1, norm=0.0
    )
    made = []
    for i in range(count):
        value = np.random.default_rng(i).uniform(1, 9, shape).astype(np.float32)
        path = folder / f"fisher_{granularity}_{i}"
        tensors = {MATRIX.removesuffix(".weight"): mx.array(value)}
        save_fisher(path, facts, tensors.items(), inputs=())
        made.append(path)
    return made


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_fisher_weighs_models_by_their_information(
    three: list[Path], tmp_path: Path, granularity: str
) -> None:
    folders = known_of(tmp_path, 3, granularity)
    report = merge_models(
        three, save_path=tmp_path / "out", method="fisher", weights=[1, 2, 3],
        fisher=folders,
    )  # fmt: skip
    known = []
    for folder in folders:
        value = read(folder, MATRIX.removesuffix(".weight"))
        value = value / np.linalg.norm(value)
        known.append(value if granularity == "element" else value[:, None])
    parts = [read(folder, MATRIX) for folder in three]
    top = total(w * f * p for w, f, p in zip([1, 2, 3], known, parts, strict=True))
    under = total(w * f for w, f in zip([1, 2, 3], known, strict=True))
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), top / under)
    name = "model.layers.0.mlp.up_proj.weight"  # has no information
    mean = total(w * read(path, name) for w, path in zip([1, 2, 3], three, strict=True))
    assert_close(mx.array(read(tmp_path / "out", name)), mean / 6)
    text = "\n".join(report.lines())
    assert "in 19 tensors have no Fisher information" in text
    for given, message in (
        (None, "needs 3 estimates"),
        (folders[:2], "needs 3 estimates"),
    ):
        with pytest.raises(DoRAError, match=message):
            merge_models(
                three, save_path=tmp_path / "two", method="fisher", fisher=given
            )
    with pytest.raises(DoRAError, match="use granularity row, not tensor"):
        merge_models(
            three, save_path=tmp_path / "two", method="fisher", fisher=folders,
            parameters={"granularity": "tensor"},
        )  # fmt: skip


@pytest.mark.parametrize("method", [m for m in ALL if m not in CHOOSING])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_copies_come_back(three: list[Path], tmp_path: Path, method, granularity):
    if method in ("magnitude_weighted", "fisher") and granularity == "tensor":
        return
    base, first, _ = three
    parameters: dict[str, Any] = {"granularity": granularity, **needed(method)}
    weights = [0.5, 0.5] if method in UNNORMALIZED else [1.0, 1.0]
    if METHODS[method].density is not None:
        parameters["density"] = 1.0
    if method == "tsv":
        weights = [1.0, 0.0]
        edit(first, **{MATRIX.replace(".", "__"): mx.array(read(base, MATRIX)) + 1.0})
    merge_models(
        [first, first][: most(method, 2)],
        base=base,
        save_path=tmp_path / "out",
        method=method,
        weights=weights if METHODS[method].takes_weights else None,
        parameters=parameters,
        fisher=known_of(tmp_path, 2) if method == "fisher" else None,
    )
    result = mx.array(read(tmp_path / "out", MATRIX))
    assert_close(result, read(first, MATRIX), bound=1e-6)


def test_packed_models_are_packed_again_and_the_error_is_reported(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    a, b = (make_tiny_folder(f"q{s}", seed=s, bits=4) for s in (1, 2))
    dense = make_tiny_folder("dense", seed=3)
    report = merge_models([a, dense], save_path=tmp_path / "out")
    errors = [tensor.packing_error for tensor in report.tensors]
    assert 0.01 < max(item for item in errors if item is not None) < 0.2
    assert "Packing 15 tensors again" in "\n".join(report.lines())
    assert load(tmp_path / "out")[0].layers
    merge_models([a, b], save_path=tmp_path / "same", weights=[1, 0])
    result, own = Checkpoint(tmp_path / "same"), Checkpoint(a)
    for name in (f"{MATRIX[:-7]}.scales", MATRIX):
        assert result.info(name).dtype == own.info(name).dtype
        assert result.info(name).shape == own.info(name).shape
    merge_models([dense, a], save_path=tmp_path / "dense_out")
    assert "model.embed_tokens.scales" not in Checkpoint(tmp_path / "dense_out").names


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_dtype_is_kept_or_as_asked(
    make_tiny_folder: MakeFolder, tmp_path: Path, dtype: str | None
) -> None:
    a, b = (make_tiny_folder(f"m{s}", seed=s, dtype=mx.bfloat16) for s in (1, 2))
    merge_models([a, b], save_path=tmp_path / "out", dtype=dtype)
    kept = {"BF16"} if dtype is None else {"F16"}
    result = Checkpoint(tmp_path / "out")
    assert {result.info(name).dtype for name in result.names} == kept


def test_different_vocabularies_need_pad(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    a = make_tiny_folder("a", seed=1)
    b = make_tiny_folder("b", seed=2, vocab_size=330)
    with pytest.raises(DoRAError, match=r"embed_tokens.*\(330, 32\).*--pad"):
        merge_models([a, b], save_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_models(
        [a, b], save_path=tmp_path / "out", method="linear", parameters={"pad": True}
    )
    name = "model.embed_tokens.weight"
    result, first, second = (read(f, name) for f in (tmp_path / "out", a, b))
    assert_close(mx.array(result[:320]), (first + second[:320]) / 2)
    assert_close(mx.array(result[320:]), second[320:], bound=1e-7)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 330
    assert load(tmp_path / "out")[0](TOKENS).shape[-1] == 330


def test_refusals_leave_nothing(three: list[Path], tmp_path: Path) -> None:
    a, b, c = three
    out = tmp_path / "out"
    there = tmp_path / "there"
    there.mkdir()
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([a, b, c], {}, "slerp merges 2 inputs, got 3"),
        ([a, b], {"method": "ties"}, "ties needs a base"),
        ([a, b], {"method": "best"}, "no merge method 'best'"),
        ([a, b], {"parameters": {"densty": 1}}, "unknown densty"),
        ([a, b], {"parameters": {"granularity": "cell"}}, "row or tensor"),
        ([a, b], {"dtype": "int8"}, "dtype must be"),
        ([a, b], {"weights": [-1, 2]}, "at least 0"),
        ([a, tmp_path / "none"], {}, "no model folder"),
        ([a, b], {"save_path": a.parent}, "holds the input .*m0"),
        ([a, b], {"save_path": there}, "already exists"),
    ]
    for models, kw, message in cases:
        with pytest.raises(DoRAError, match=message):
            merge_models(models, **{"save_path": out, **kw})
    edit(b, **{MATRIX.replace(".", "__"): mx.full((32, 64), float("nan"))})
    with pytest.raises(DoRAError, match=f"{MATRIX} holds NaN"):
        merge_models([a, b], save_path=out)
    edit(b, extra=mx.ones(3))
    with pytest.raises(DoRAError, match="extra: extra"):
        merge_models([a, b], save_path=out)
    index = {"weight_map": {"model.norm.weight": "../a.safetensors"}}
    (c / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DoRAError, match="not a plain name"):
        merge_models([a, c], save_path=out)
    (c / "model.safetensors.index.json").unlink()
    whole = (c / "model.safetensors").read_bytes()
    (c / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(DoRAError, match="cut off"):
        merge_models([a, c], save_path=out)
    (c / "model.safetensors").write_bytes(overlapping(whole))
    with pytest.raises(DoRAError, match="invalid offset for tensor"):
        merge_models([a, c], save_path=out)
    (c / "model.safetensors").write_bytes(whole)
    edit(c, **{MATRIX.replace(".", "__"): mx.ones((64, 32))})
    with pytest.raises(DoRAError, match=r"other shapes: .*\(64, 32\) for \(32, 64\)"):
        merge_models([a, c], save_path=out)
    config = json.loads((c / "config.json").read_text())
    (c / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    (c / "model.safetensors").write_bytes(whole)
    with pytest.raises(DoRAError, match="is a qwen2 model"):
        merge_models([a, c], save_path=out)
    names = [path.name for path in tmp_path.iterdir()]
    # No files are left, hidden or not.
    assert sorted(names) == ["m0", "m1", "m2", "there"]


def overlapping(whole: bytes) -> bytes:
    """The file with its last tensor moved over the previous tensor."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header.pop("__metadata__", None)
    last = max(header.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [place - 4 for place in last["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size : -4]


def test_memory_is_bounded(
    make_tiny_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Keep the ratio of block to tensor as small as in a real model.
    monkeypatch.setattr(blockwise, "BLOCK", 1 << 14)
    sizes = {"vocab_size": 20_000, "hidden_size": 64, "num_hidden_layers": 1}
    models = [make_tiny_folder(f"m{s}", seed=s, **sizes) for s in range(4)]
    largest = 4 * 20_000 * 64
    mx.clear_cache()
    for method in ("karcher", "ties", "linear"):
        before = mx.get_active_memory()
        plan = plan_models(
            [str(name) for name in models[1:]],
            base=str(models[0]),
            method=method,
            parameters={"density": 0.5} if METHODS[method].density else {},
        )
        report = run_merge(plan, tmp_path / method, max_shard_bytes=1 << 20)
        held = report.peak_bytes - before
        assert held <= (4 + 3) * largest + largest  # the output shard is that tensor


@pytest.mark.parametrize(
    "method", ["breadcrumbs", "della", "sce", "nearswap", "arcee_fusion", "nmean"]
)
def test_newer_methods_hold_a_few_tensors(
    make_tiny_folder: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """MLX's and NumPy's memory: the sizes of one change, and masks, are held whole."""
    monkeypatch.setattr(blockwise, "BLOCK", 1 << 14)
    sizes = {"vocab_size": 20_000, "hidden_size": 64, "num_hidden_layers": 1}
    count = 1 + most(method, 2)
    base, *tuned = [
        str(make_tiny_folder(f"m{s}", seed=s, **sizes)) for s in range(count)
    ]
    largest = 4 * 20_000 * 64
    parameters = needed(method, select_topk=0.5)
    if METHODS[method].density is not None:
        parameters["density"] = 0.5
    plan = plan_models(tuned, base=base, method=method, parameters=parameters)
    run_merge(plan, tmp_path / "first")  # imports, caches
    mx.clear_cache()
    before = mx.get_active_memory()
    tracemalloc.start()
    report = run_merge(plan, tmp_path / "out", max_shard_bytes=1 << 20)
    _, held = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.peak_bytes - before + held <= 3 * largest


def test_the_command(three: list[Path], tmp_path: Path) -> None:
    a, b, c = map(str, three)
    out = str(tmp_path / "out")
    args = ["models", a, b, c, "--method", "karcher", "--save-path", out]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    assert "Merged 20 tensors of 3 models by karcher" in result.stdout
    result = CliRunner().invoke(command, [*args, "-q"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"merge_method: linear\nmodels:\n- model: {a}\n  parameters: {{weight: 1}}\n"
        f"- model: {b}\n  parameters: {{weight: [1, 3]}}\n"
    )
    args = ["models", "--config", str(config), "--save-path", str(tmp_path / "two")]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    expected = (read(three[0], MATRIX) + 3 * read(three[1], MATRIX)) / 4
    assert_close(mx.array(read(tmp_path / "two", MATRIX)), expected)
    assert CliRunner().invoke(command, [*args, a]).exit_code == 2
    config.write_text("merge_method: [")
    assert "is not valid YAML" in CliRunner().invoke(command, args).stderr
