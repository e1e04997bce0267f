import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, load
from mlx_dora.adapters.surgery import FineTuneType, apply_layers
from mlx_dora.cli._train_text import describe_plan
from mlx_dora.cli.train import command
from mlx_dora.data.counts import RowSizes
from mlx_dora.errors import DoRAError
from mlx_dora.train import TrainConfig, plan_memory
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.plan.predict import predict
from mlx_dora.train.plan.preview import preview_training
from mlx_dora.train.plan.rows import row_sizes
from mlx_dora.train.plan.shapes import ModelShapes, read_shapes
from mlx_dora.train.run.start import trainable_tensors
from tests.adapters.stacks import write_folder

MiB = 1 << 20
BIG = ModelShapes(
    name="llama",
    weight_bytes=4 << 30,
    element_bytes=2,
    vocabulary=150_000,
    hidden=4096,
    heads=32,
    block_width=12_288,
    block_elements=(110_000,) * 32,
    trainable=20_000_000,
    blocks=32,
)


def config(model: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(**{"model": str(model), "max_seq_length": 65, **settings})


@pytest.mark.parametrize("kind", ["dora", "lora", "full"])
@pytest.mark.parametrize("bits", [None, 4])
def test_weight_bytes_and_trained_parameters_match_the_model(
    make_tiny_folder: Callable[..., Path], kind: FineTuneType, bits: int | None
) -> None:
    if kind == "full" and bits:
        return  # quantized weights cannot be trained
    folder = make_tiny_folder(bits=bits)
    dora = DoRAConfig(rank=4, num_layers=1)
    shapes = read_shapes(folder, dora, kind)
    model, _ = load(str(folder))
    stored = sum(value.nbytes for _, value in tree_flatten(model.parameters()))  # pyright: ignore[reportAttributeAccessIssue] - arrays
    assert shapes.weight_bytes == stored
    apply_layers(model, dora, kind)
    trained = sum(value.size for value in trainable_tensors(model).values())
    assert shapes.trainable == trained
    assert len(shapes.block_elements) == 1


def test_an_adapted_embedding_trains_through_every_block(
    tiny_model_folder: Path,
) -> None:
    dora = DoRAConfig(rank=4, num_layers=1, keys=("model.embed_tokens",))
    shapes = read_shapes(tiny_model_folder, dora, "dora")
    assert len(shapes.block_elements) == 2
    model, _ = load(str(tiny_model_folder))
    apply_dora(model, dora)
    trained = sum(value.size for value in trainable_tensors(model).values())
    assert shapes.trainable == trained


def test_no_weight_is_read(tiny_model_folder: Path) -> None:
    file = tiny_model_folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[8 + length :] = b"\xff" * (len(content) - 8 - length)  # all NaN
    file.write_bytes(content)
    plan = plan_memory(config(tiny_model_folder), DoRAConfig(num_layers=-1))
    assert plan.weights < plan.peak < 100 * MiB


def test_terms_grow_with_length_batch_and_optimizer() -> None:
    limit = 64 << 30
    train = TrainConfig(model="x", batch_size=2, max_seq_length=1025)
    base = predict(BIG, train, limit)
    long = predict(BIG, replace(train, max_seq_length=2049), limit)
    wide = predict(BIG, replace(train, batch_size=4), limit)
    assert long.activations == wide.activations == 2 * base.activations
    assert long.scores == 2 * wide.scores == 4 * base.scores
    assert base.scores == (32 + 2) * 2 * 32 * 1024**2 * 2
    assert long.logits == base.logits  # logits are computed in chunks
    light = predict(BIG, replace(train, grad_checkpoint=True), limit)
    assert light.activations < base.activations / 8
    sgd = predict(BIG, replace(train, optimizer="sgd"), limit)
    assert base.optimizer == 2 * sgd.optimizer == 2 * base.adapter


def test_the_largest_sizes_fit_and_larger_sizes_do_not() -> None:
    limit = 40 << 30
    train = TrainConfig(model="x", batch_size=2, max_seq_length=1025)
    plan = predict(BIG, train, limit)
    for field, largest, step in (
        ("max_seq_length", plan.longest, 8),
        ("batch_size", plan.largest_batch, 1),
    ):
        assert predict(BIG, replace(train, **{field: largest}), limit).fits
        assert not predict(BIG, replace(train, **{field: largest + step}), limit).fits


def test_advice_makes_it_fit(tiny_model_folder: Path) -> None:
    train = config(tiny_model_folder, batch_size=16, max_seq_length=2048)
    dora = DoRAConfig(rank=4, num_layers=-1)
    whole = plan_memory(train, dora, limit=1 << 40)
    assert whole.fits
    assert whole.advice == ()
    light = replace(train, grad_checkpoint=True)
    limit = plan_memory(light, dora, limit=1 << 40).peak
    assert plan_memory(train, dora, limit=limit).advice == ("--grad-checkpoint",)
    tight = plan_memory(train, dora, limit=limit // 3)
    assert not tight.fits
    assert tight.advice[1].startswith("--batch-size ")
    rows, steps = (int(word) for word in tight.advice[1].split()[1::2])
    assert rows * steps == 16
    smaller = replace(light, batch_size=rows, grad_accumulation_steps=steps)
    assert plan_memory(smaller, dora, limit=limit // 3).fits
    assert "smaller or quantized" in plan_memory(train, dora, limit=1000).advice[0]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_are_planned(kind: str, bits: int | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "moe", kind, bits)
    dora = DoRAConfig(rank=4, num_layers=1)
    shapes = read_shapes(folder, dora, "dora")
    model, _ = load(str(folder))
    stored = sum(value.nbytes for _, value in tree_flatten(model.parameters()))  # pyright: ignore[reportAttributeAccessIssue] - arrays
    assert shapes.weight_bytes == stored
    paths = apply_dora(model, dora)
    trained = sum(value.size for value in trainable_tensors(model).values())
    assert shapes.trainable == trained
    # Two experts per token: the hidden layers and outputs of both.
    inner = 2 * (32 if kind == "qwen3_moe" else 64)
    assert shapes.block_width == max(inner, 2 * 64)
    attention = 2 * 64 + 2 * 4 * 16 + 3 * 2 * 16
    own = 64 + 64 + (4 * 16 + 2 * 16 + 64)  # inputs of qkv and o; outputs of q, k and o
    router = 64 + 4
    stacks = 2 * 64 + inner + 2 * (2 * inner + 2 * 64)
    assert len(paths) == 8
    assert shapes.block_elements == (
        attention + 4 * inner + 2 * 64 + own + router + stacks,
    )


def test_models_without_a_plan_are_refused_by_name(tmp_path: Path) -> None:
    latent = write_folder(tmp_path / "latent", "deepseek_v3")
    with pytest.raises(DoRAError, match="its attention is latent"):
        plan_memory(config(latent), DoRAConfig())
    moe = write_folder(tmp_path / "moe", "mixtral")
    with pytest.raises(DoRAError, match="experts are planned with adapters only"):
        plan_memory(config(moe, fine_tune_type="full"), DoRAConfig())
    path = moe / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_experts_per_tok": 0}))
    with pytest.raises(DoRAError, match="its config has none of num_experts_per_tok, "):
        plan_memory(config(moe), DoRAConfig())


def test_the_longest_rows_after_cutting_are_planned(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    dora = DoRAConfig(rank=4, num_layers=1)
    whole = plan_memory(config(tiny_model_folder, max_seq_length=2048), dora)
    assert (whole.rows, whole.length) == (None, 2048)
    data = tmp_path / "train.jsonl"
    data.write_text(
        '{"text": "the fox"}\n' * 3
        + '{"text": "the quick brown fox jumps over the lazy dog"}\n'
    )
    named = config(tiny_model_folder, data=str(data), max_seq_length=2048)
    plan = plan_memory(named, dora)
    sizes = RowSizes(lengths=(3, 3, 3, 10), targets=(2, 2, 2, 9))
    assert row_sizes(named, make_objective(named)) == sizes
    given = plan_memory(replace(named, data="none"), dora, lengths=[3, 3, 3, 10])
    assert plan.rows == given.rows == 4
    assert plan.length == given.length == 17  # 10 tokens, padded
    assert plan.peak == given.peak < whole.peak / 100
    short = plan_memory(replace(named, max_seq_length=7), dora)
    assert short.length == 7
    few = plan_memory(named, dora, lengths=[5, 5])
    assert few.batch_size == 2
    packed = plan_memory(replace(named, packing=True, max_seq_length=16), dora)
    assert packed.length == 16
    assert [p.longest_row for p in (whole, plan, given, short, few)] == [
        None, 10, 10, 7, 5,
    ]  # fmt: skip
    first = [describe_plan(p)[0].partition("batches of ")[2] for p in (plan, short)]
    assert first == [
        "4 rows padded to 17 tokens (the longest of 4 rows has 10):",
        "4 rows of 7 tokens (the longest of 4 rows):",
    ]
    joined = "4 rows joined by --packing"
    assert f"4 rows of 16 tokens ({joined}):" in describe_plan(packed)[0]


def test_the_plan_and_the_data_page_name_the_same_longest_row(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "the fox"}\n{"text": "the quick brown fox"}\n' * 4)
    settings = config(tiny_model_folder, data=str(data))
    plan = plan_memory(settings, DoRAConfig(rank=4, num_layers=1))
    survey = preview_training(settings, DoRAConfig(rank=4, num_layers=1)).survey
    assert plan.longest_row == max(survey.splits[0].lengths)
    assert f"has {max(survey.splits[0].lengths)})" in describe_plan(plan)[0]


def test_data_that_do_not_exist_are_refused(tiny_model_folder: Path) -> None:
    arguments = ["--model", str(tiny_model_folder), "--num-layers", "-1", "--plan"]
    arguments += ["--data", "no/such/data"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1
    assert "no/such/data does not exist" in result.stderr


def test_what_does_not_fit_is_not_offered() -> None:
    tight = predict(BIG, TrainConfig(model="x"), limit=5 << 30)
    text = "\n".join(describe_plan(tight))
    assert (tight.longest, tight.largest_batch) == (16, 0)
    assert "Would fit: 4 rows of up to 16 tokens." in text
    none = predict(BIG, TrainConfig(model="x"), limit=1 << 30)
    assert "Would fit" not in "\n".join(describe_plan(none))


def test_the_command_prints_a_plan_and_does_not_train(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(tiny_model_folder), "--num-layers", "-1", "--plan"]
    out = tmp_path / "adapter"
    arguments += ["--adapter-path", str(out), "--max-seq-length", "64"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "batches of 4 rows of 64 tokens (the maximum; name --data" in result.stdout
    assert "fits into this machine's" in result.stdout
    assert "attention scores" in result.stdout
    assert not out.exists()


def test_only_targets_need_logits_where_nothing_is_compiled(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = config(tiny_model_folder, batch_size=2, max_seq_length=2048)
    dora = DoRAConfig(rank=4, num_layers=1)
    masked = RowSizes(lengths=(65, 65, 33), targets=(5, 30, 20))
    vocabulary = read_shapes(tiny_model_folder, dora, "dora").vocabulary
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")

    def logits(lengths: Any, **changes: Any) -> int:
        return plan_memory(replace(train, **changes), dora, lengths=lengths).logits

    # Two rows of at most 30 + 20 targets, in three chunks of 50.
    assert logits(masked) == 3 * 50 * vocabulary * 4
    # 64 inputs in each of two rows: a chunk of 128.
    assert logits([65, 65, 33]) == 3 * 128 * vocabulary * 4
    # By width: one row of 64 inputs with 30 targets, or of 32 inputs with 20.
    assert logits(masked, batch_tokens=65) == 3 * 30 * vocabulary * 4
    # A row cut to 25 inputs can keep all of its 30 targets but those.
    assert logits(masked, max_seq_length=26) == 3 * 50 * vocabulary * 4
    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    assert logits(masked) == logits([65, 65, 33])
