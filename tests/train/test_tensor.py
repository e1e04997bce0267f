"""Training with tensor parallelism: every process has the whole batch."""

from pathlib import Path

import pytest

from tests.train.sharded import Case
from tests.train.test_sharded import compare

# Heads and widths that four processes divide, and groups of a packed row too.
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
WIDE |= {"intermediate_size": 256}
BIASED = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
# Adam amplifies rounding from step to step; a smaller rate keeps it below the bound.
RATE = {"learning_rate": 3e-4}
CASES = (
    Case(
        name="dense-dora-tied",
        model=WIDE,
        shard="tensor",
        train=RATE,
        dora={"keys": None, "dropout": 0.25},
    ),
    Case(
        name="packed-dora-untied",
        bits=4,
        model=WIDE | BIASED,
        shard="tensor",
        train={**RATE, "grad_checkpoint": True},
        dora={"num_layers": 1},
    ),
    Case(
        name="dense-lora-untied",
        model=WIDE | BIASED,
        shard="tensor",
        train={**RATE, "fine_tune_type": "lora", "grad_accumulation_steps": 2},
    ),
    Case(
        name="packed-lora-tied",
        bits=4,
        model=WIDE,
        shard="tensor",
        train={**RATE, "fine_tune_type": "lora", "packing": True},
    ),
    Case(
        name="packed-dora-head",
        bits=4,
        model=WIDE,
        shard="tensor",
        train=RATE,
        dora={"keys": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"]},
    ),
)


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        pytest.param(2, CASES[:1], id="two"),
        pytest.param(2, CASES[1:3], id="two-packed"),
        pytest.param(2, CASES[3:], id="two-others", marks=pytest.mark.slow),
        pytest.param(4, CASES[:1], id="four", marks=pytest.mark.slow),
        pytest.param(4, CASES[1:], id="four-others", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_equal_those_of_a_single_process(
    tmp_path: Path, processes: int, cases: tuple[Case, ...]
) -> None:
    compare(tmp_path, processes, cases)
