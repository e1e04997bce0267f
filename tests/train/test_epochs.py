from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest

from mlx_dora import DoRAConfig
from mlx_dora.errors import DoRAError
from mlx_dora.train import TrainConfig, finetune
from tests.train.conftest import EXAMPLES
from tests.train.saved import config

TARGETS = sum(len(tokens) - max(first, 1) for tokens, first in EXAMPLES)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_trains_on_every_target_once(
    run: Callable[..., Any], packing: bool, accumulate: int
) -> None:
    _, report = run(
        epochs=3,
        batch_size=5,
        packing=packing,
        max_seq_length=40,
        grad_accumulation_steps=accumulate,
    )
    assert report.trained_tokens == 3 * TARGETS
    rows = 7 if packing else len(EXAMPLES)  # 190 tokens; four of 22 cannot pair up
    assert report.steps == 3 * -(-rows // 5)
    summary = config(report.adapter_path)["mlx_dora"]["training"]
    assert (summary["iters"], summary["packing"]) == (report.steps, packing)


def test_packed_training_learns_like_unpacked(run: Callable[..., Any]) -> None:
    settings = {"valid": EXAMPLES, "optimizer": "sgd", "learning_rate": 0.5}
    _, plain = run("plain", iters=8, batch_size=12, **settings)
    _, packed = run(
        "packed", iters=8, batch_size=4, packing=True, max_seq_length=64, **settings
    )
    # A batch holds all the data in both runs, so gradients agree up to rounding.
    assert packed.trained_tokens == plain.trained_tokens
    assert packed.val_loss == pytest.approx(plain.val_loss, rel=1e-4)
    assert packed.val_loss < packed.first_val_loss


def test_packing_is_refused_where_documents_would_mix(tmp_path: Any) -> None:
    from mlx_lm.models import gpt2

    arguments = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 4}
    more = {"n_layer": 1, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    model: nn.Module = gpt2.Model(
        gpt2.ModelArgs.from_dict({**arguments, **more, "vocab_size": 64})
    )
    with pytest.raises(DoRAError, match="keep documents apart in gpt2"):
        finetune(
            model,
            None,
            EXAMPLES,
            None,
            train=TrainConfig(packing=True),
            dora=DoRAConfig(num_layers=-1, keys=("attn.c_attn",)),
            adapter_path=tmp_path / "adapter",
        )


@pytest.mark.parametrize("packing", [False, True])
def test_validation_after_epochs(run: Callable[..., Any], packing: bool) -> None:
    settings = {"packing": packing, "batch_size": 5, "max_seq_length": 40}
    ends = [
        run(f"{n}", epochs=n, **settings)[1].steps  # the steps of n epochs
        for n in (2, 4, 5)
    ]
    _, report = run(
        "all", epochs=5, epochs_per_eval=2, steps_per_eval=1, valid=EXAMPLES, **settings
    )
    steps = [entry.step for entry in report.history if entry.val_loss is not None]
    assert steps == [0, *ends]


def test_epochs_of_custom_batches_are_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(DoRAError, match="cannot count custom batches: set iters"):
        run(epochs=2, options={"batches": lambda *_, **__: iter(())})
