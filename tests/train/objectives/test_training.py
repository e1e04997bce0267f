"""Trainings of preferences: the reference, refusals, units, accumulation, variants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_dora import DoRAConfig, apply_dora, disabled, load_adapter
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.data.batches import batches_once, pad_batch
from mlx_dora.data.schedule import Schedule
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.log_probabilities import row_log_probs
from mlx_dora.train import TrainConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.dpo import Dpo
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.objectives.reference import EarlierAdapter, Reference
from mlx_dora.train.stepper import Stepper
from tests.adapters.stacks import make_model
from tests.checks import assert_close, to_numpy
from tests.train.conftest import EXAMPLES, ExampleSet
from tests.train.saved import tensors
from tests.train.test_variants import WAYS

Run = Callable[..., tuple[Any, Any]]
TOKENS = mx.array([[1, 12, 13, 14, 15, 2]])


@pytest.fixture
def dpo(run: Run) -> Run:
    """Train with DPO: ``dpo("name", beta=0.3, iters=4, ...)``."""
    ours = set(PreferenceConfig.__dataclass_fields__)

    def call(name: str = "adapter", **settings: Any) -> tuple[Any, Any]:
        own = {key: settings.pop(key) for key in ours & set(settings)}
        options = {"preference": PreferenceConfig(**own)}
        given = {"data": ExampleSet(), "valid": ExampleSet(), "objective": "dpo"}
        return run(
            name, options=options, **{**given, "batch_size": 2, "iters": 4, **settings}
        )

    return call


def totals(model: nn.Module) -> np.ndarray:
    model.eval()
    batch = pad_batch(EXAMPLES, 64)
    return np.array(row_log_probs(model, *batch, gradient=False).total)


def test_training_prefers_the_chosen_answers(dpo: Run) -> None:
    model, report = dpo(iters=12, steps_per_report=6)
    first, *_, last = [line for line in report.history if line.val_loss is not None]
    assert first.val_loss == pytest.approx(np.log(2), rel=1e-6)
    assert first.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last.val_loss < 0.3
    assert last.metrics["rewards/accuracies"] == 1
    after = totals(model)
    with disabled(model):
        before = totals(model)
    reward = 0.1 * (after - before)
    assert last.metrics["rewards/chosen"] == pytest.approx(reward[::2].mean(), rel=1e-4)
    assert last.metrics["rewards/margins"] == pytest.approx(
        (reward[::2] - reward[1::2]).mean(), rel=1e-4
    )
    assert last.metrics["logps/rejected"] == pytest.approx(after[1::2].mean(), rel=1e-4)


@pytest.mark.parametrize("kind", ["dora", "lora", "full"])
def test_the_reference_is_the_model_as_it_was(
    dpo: Run, make_tiny_model: Callable[..., nn.Module], kind: str
) -> None:
    before = totals(make_tiny_model())
    model, report = dpo(fine_tune_type=kind, iters=6)
    after = totals(model)
    metrics = [line.metrics for line in report.history if line.val_loss is not None][-1]
    reward = 0.1 * (after - before)
    assert abs(reward).max() > 0.1
    assert metrics["rewards/chosen"] == pytest.approx(reward[::2].mean(), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(reward[1::2].mean(), rel=1e-4)


def test_a_table_of_the_reference_trains_alike(dpo: Run) -> None:
    _, live = dpo("live")
    _, table = dpo("table", precompute_reference=True)
    accuracies = []
    for one, other in zip(live.history, table.history, strict=True):
        # Of rewards of 0, rounding decides which is greater.
        rest = [{**one.metrics}, {**other.metrics}]
        accuracies = [metrics.pop("rewards/accuracies") for metrics in rest]
        assert rest[0] == pytest.approx(rest[1], rel=1e-4, abs=1e-4)
    assert accuracies == [1, 1]
    ours, theirs = tensors(live.adapter_path), tensors(table.adapter_path)
    for name, value in ours.items():
        assert_close(value, to_numpy(theirs[name]), bound=1e-3)  # Adam, few steps


def test_a_table_made_for_another_training_is_refused(dpo: Run) -> None:
    _, report = dpo(precompute_reference=True)
    path = report.adapter_path / "reference.safetensors"
    content = path.read_bytes()
    (report.adapter_path / "adapters.safetensors").unlink()
    for name in ("checkpoints", "best"):
        for file in sorted((report.adapter_path / name).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    other = [[*row[0][:-1], 9] for row in EXAMPLES]

    class Other(ExampleSet):
        def __getitem__(self, index: int, /) -> Any:
            return other[index], EXAMPLES[index][1]

    with pytest.raises(DoRAError) as caught:
        dpo(precompute_reference=True, data=Other())
    text = str(caught.value)
    assert "made for another training (train data differ)" in text
    assert "\n" not in text
    assert path.read_bytes() == content
    with pytest.raises(DoRAError, match="max_seq_length differ"):
        dpo(precompute_reference=True, max_seq_length=64)
    dpo(precompute_reference=True, data=Other(), overwrite=True)
    assert path.read_bytes() != content


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_earlier_adapter_is_the_reference(
    dpo: Run, run: Run, make_tiny_model: Callable[..., nn.Module], kind: str
) -> None:
    _, earlier = run("earlier", iters=4, fine_tune_type=kind, keys=["mlp.up_proj"])
    path = str(earlier.adapter_path)
    model = make_tiny_model()
    base = totals(model)
    reference = EarlierAdapter(model, path)
    assert (totals(model) == base).all()
    with reference.standing_in(model):
        inside = totals(model)
    assert (totals(model) == base).all()
    attach_adapter(model, load_adapter(path))
    assert_close(mx.array(inside), totals(model))
    assert abs(inside - base).max() > 0.1

    trained, report = dpo(reference_adapter=path, iters=6, precompute_reference=False)
    metrics = [line.metrics for line in report.history if line.val_loss is not None]
    reward = 0.1 * (totals(trained) - inside)
    assert metrics[-1]["rewards/chosen"] == pytest.approx(reward[::2].mean(), rel=1e-3)
    first = 0.1 * (base - inside)
    assert metrics[0]["rewards/chosen"] == pytest.approx(first[::2].mean(), rel=1e-3)
    with pytest.raises(DoRAError, match=r"preference\.reference_adapter was"):
        dpo(resume=True, iters=8)


def test_a_reference_stands_in_for_the_very_layers_of_an_adapted_model(
    run: Run, make_tiny_model: Callable[..., nn.Module]
) -> None:
    _, earlier = run("earlier", iters=4, keys=["self_attn.q_proj"])
    model = make_tiny_model()
    apply_dora(model, DoRAConfig(rank=2, keys=("mlp.up_proj",), num_layers=-1))
    layers = [module for _, module in model.named_modules()]
    reference = EarlierAdapter(model, str(earlier.adapter_path))
    for here in (Reference(), reference):
        before = totals(model)
        with here.standing_in(model):
            totals(model)
        found = [module for _, module in model.named_modules()]
        assert [id(one) for one in found] == [id(one) for one in layers]
        assert (totals(model) == before).all()


def test_full_weights_are_no_reference_adapter(dpo: Run, run: Run) -> None:
    _, full = run("full", iters=2, fine_tune_type="full")
    with pytest.raises(DoRAError, match="holds full weights, not an adapter"):
        dpo(reference_adapter=str(full.adapter_path))


def test_the_best_adapter_has_the_best_accuracy(dpo: Run) -> None:
    _, report = dpo(iters=8, steps_per_eval=2, best_metric="accuracy")
    found = [
        (line.metrics["rewards/accuracies"], -line.val_loss, line.step)
        for line in report.history
        if line.val_loss is not None
    ]
    assert report.best_step == max(found)[2]
    assert (report.adapter_path / "best" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "is not read by loss_type sigmoid: use robust or"),
        (
            {"loss_type": ("hinge", "aot"), "f_divergence_type": "forward_kl"},
            "f_divergence_type forward_kl does not apply to loss_type aot: use sigmoid",
        ),
        ({"f_alpha_divergence_coef": 0.7}, "alpha_divergence alone, not with reverse"),
        ({"ld_alpha": 0.5, "precompute_reference": True}, "ld_alpha weighs an answer"),
        ({"ld_alpha": 1.5}, "ld_alpha must be"),
        ({"loss_type": ("exo_pair",)}, "takes the logarithm of label_smoothing"),
        ({"loss_type": ("dpo",)}, "loss_type of objective dpo must be sigmoid or "),
        ({"simpo_gamma": 1.0}, "simpo_gamma does not apply to objective dpo"),
        ({"desirable_weight": 2.0}, "desirable_weight does not apply"),
        ({"loss_weights": (1.0, 2.0)}, "has 2 weights for 1 loss types"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"packing": True}, "packing joins rows of text"),
        ({"variant": "bidora"}, "variant bidora splits single rows"),
        ({"mask_prompt": True}, "mask_prompt is for objective sft"),
        ({"objective": "orpo", "precompute_reference": True}, "does not apply to obj"),
        ({"objective": "orpo", "loss_type": ("ipo",)}, "loss_type does not apply"),
        ({"objective": "kto", "batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"objective": "kto", "best_metric": "accuracy"}, "needs pairs"),
        ({"objective": "sft", "beta": 0.2}, "do not apply to objective sft"),
        ({"batch_tokens": 20}, "batch_tokens 20 / 2 rows a pair holds no row of 23"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    dpo: Run, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DoRAError) as caught:
        dpo(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_custom_batches_are_for_examples_alone(dpo: Run, run: Run) -> None:
    with pytest.raises(
        DoRAError, match="custom batches are for objective sft, not dpo"
    ):
        run(
            objective="dpo",
            data=ExampleSet(),
            options={"batches": lambda *_, **__: iter(())},
        )


def test_data_of_another_objective_are_refused(dpo: Run) -> None:
    class Labeled(ExampleSet):
        serves = ("kto",)

    with pytest.raises(DoRAError, match="was read for objective kto, not dpo"):
        dpo(data=Labeled())


def test_a_resumed_run_needs_the_same_objective_and_labels(dpo: Run) -> None:
    dpo(beta=0.2)
    with pytest.raises(DoRAError, match=r"beta was 0\.2, is 0\.1"):
        dpo(resume=True, iters=6)
    with pytest.raises(DoRAError, match='objective was "dpo", is null'):
        dpo(resume=True, iters=6, objective="sft")

    class Others(ExampleSet):
        def label(self, index: int) -> bool:
            return index % 2 == 0

    dpo("kto", objective="kto")
    with pytest.raises(DoRAError, match="labels was"):
        dpo("kto", objective="kto", data=Others(), resume=True, iters=6)


def test_the_adapter_records_its_objective(dpo: Run) -> None:
    _, report = dpo(loss_type=("ipo", "sft"))
    adapter = load_adapter(report.adapter_path)
    recorded = adapter.training
    assert recorded is not None
    assert recorded["objective"] == "dpo"
    assert recorded["loss_type"] == ["ipo", "sft"]
    assert recorded["beta"] == 0.1


def test_pairs_stay_together_in_every_batch() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"batch_tokens": 120},
        {"batch_tokens": 160, "ranks": 2},
    ]
    for settings in cases:
        ranks = settings.get("ranks", 1)
        schedule = Schedule(EXAMPLES, 3, 64, unit=2, **settings)
        seen: list[int] = []
        for rank in range(ranks):
            stream = schedule.batches(0, rank, ranks)
            for _ in range(schedule.length(1)):
                tokens, marks, indices = next(stream)
                chosen, rejected = np.array(indices).reshape(2, -1)
                assert ((rejected == chosen + 1) | (chosen < 0)).all()
                assert (chosen % 2 == 0)[chosen >= 0].all()
                assert tokens.shape[0] == marks.shape[0] == len(chosen) * 2
                if "batch_tokens" in settings:
                    assert tokens.size * ranks <= settings["batch_tokens"]
                for row, index in enumerate(np.array(indices).tolist()):
                    if index >= 0:
                        words, first = EXAMPLES[index]
                        end = len(words)
                        assert np.array(tokens[row, :end]).tolist() == words
                        assert marks[row].tolist() == [first, end]
                seen += chosen[chosen >= 0].tolist()
        assert sorted(seen) == list(range(0, len(EXAMPLES), 2))
        usage = schedule.usage()
        real = sum(len(words) - 1 for words, _ in EXAMPLES)
        inputs = sum(
            rows * (width - 1)
            for batch, fixed in schedule._epoch(0)
            for rows, width in [_shape(schedule, batch, fixed)]
        )
        assert usage.padding == pytest.approx(1 - real / inputs)


def _shape(schedule: Schedule, batch: Any, width: int | None) -> tuple[int, int]:
    tokens = schedule._make(batch, width)[0]
    return tokens.shape[0], tokens.shape[1]


def test_a_pair_is_left_out_if_one_answer_has_no_target() -> None:
    rows = [([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5], 4), *EXAMPLES[:2]]
    schedule = Schedule(rows, 4, 4, unit=2)
    assert [row for batch in schedule.epoch(0) for row in batch] == [(2,)]
    (batch,) = batches_once(rows, 4, 4, unit=2)
    assert batch[2].tolist() == [2, 3]


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_accumulated_batches_equal_a_large_batch(
    make_tiny_model: Callable[..., nn.Module], objective: str
) -> None:
    model = make_tiny_model()
    apply_layers(model, DoRAConfig(rank=4, num_layers=-1), "dora")
    model.train()
    own: dict[str, Any] = {"cpo_alpha": 0.0} if objective == "simpo" else {}
    train = TrainConfig(objective=objective, max_grad_norm=None)  # pyright: ignore[reportArgumentType]
    made = make_objective(train, PreferenceConfig(**own))
    found = []
    for size in (6, 2):
        window = list(batches_once(ExampleSet(), size, 64, unit=2))
        stepper = Stepper(
            model,
            Stepper.make_optimizer(train),
            loss=made.loss,
            complete=lambda window: made.completed(model, ExampleSet(), window),
            group=mx.distributed.init(),
            settings=train,
        )
        found.append(stepper.gradient(window))
    whole, parts = found
    assert (whole.count, whole.tokens) == (parts.count, parts.tokens)
    assert whole.count == 6
    assert whole.loss == pytest.approx(parts.loss * 1.0, rel=1e-5)
    assert whole.norm == pytest.approx(parts.norm, rel=1e-4)
    assert whole.table == pytest.approx(parts.table, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bidora"])
def test_variants_train_on_preferences(
    dpo: Run, make_tiny_model: Callable[..., nn.Module], way: str
) -> None:
    model, report = dpo(iters=6, steps_per_report=3, **WAYS[way])
    losses = [line.val_loss for line in report.history if line.val_loss is not None]
    assert losses[0] == pytest.approx(np.log(2), abs=2e-4)
    assert losses[-1] < losses[0]
    again = make_tiny_model()
    attach_adapter(again, load_adapter(report.adapter_path))
    assert_close(mx.array(totals(again)), totals(model), bound=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_packed_bases_train_on_preferences(
    dpo: Run, make_tiny_model: Callable[..., nn.Module], objective: str
) -> None:
    _, report = dpo(model=make_tiny_model(bits=4), iters=8, objective=objective)
    losses = [line.val_loss for line in report.history if line.val_loss is not None]
    assert losses[-1] < losses[0]


def test_adapters_of_experts_train_on_preferences(dpo: Run) -> None:
    model = make_model("qwen3_moe", None)
    _, report = dpo(model=model, iters=6, num_layers=2)
    losses = [line.val_loss for line in report.history if line.val_loss is not None]
    assert losses[-1] < losses[0]
    assert any(value.ndim == 3 for value in tensors(report.adapter_path).values())


def test_settings_default_to_those_of_trl() -> None:
    config = PreferenceConfig()
    names = ("label_smoothing", "discopop_tau", "desirable_weight", "simpo_gamma")
    names += ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "cpo_alpha")
    found = {name: getattr(config, name) for name in names}
    assert found == {
        "label_smoothing": 0.0,
        "discopop_tau": 0.05,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "desirable_weight": 1.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 1.0,
    }
    assert (Dpo(config).beta, Dpo(config).loss_type) == (0.1, ("sigmoid",))
