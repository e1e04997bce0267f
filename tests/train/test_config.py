from dataclasses import fields
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train import TrainConfig

OURS = {
    "valid_share",
    "overwrite",
    "hf_dataset",
    "epochs",
    "epochs_per_eval",
    "packing",
    "batch_tokens",
    "memory_limit",
    "all_turns",
    "resume",
    "force",
    "objective",
    "shard",
    "keep_last",
    "early_stop",
    "max_grad_norm",
    "max_bad_steps",
    "lora_plus_ratio",
    "rank_every",
    "rank_rounds",
    "magnitude_share",
}
FEATURES = {"prompt_feature", "completion_feature", "chat_feature", "text_feature"}
# Settings of the adapter, which are in DoRAConfig.
ELSEWHERE = {"num_layers", "lora_parameters", "config"}
DIFFERENT = {"model", "train", "fine_tune_type", "optimizer_config"}


def test_fields_and_defaults_match_mlx_lm() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    ours = {field.name: field.default for field in fields(TrainConfig)}
    assert set(ours) - OURS - FEATURES == set(CONFIG_DEFAULTS) - ELSEWHERE
    for name in set(CONFIG_DEFAULTS) - ELSEWHERE - DIFFERENT:
        assert ours[name] == CONFIG_DEFAULTS[name], name
    assert ours["fine_tune_type"] == "dora"


def test_every_field_has_help() -> None:
    assert all(field.metadata.get("help") for field in fields(TrainConfig))


@pytest.mark.parametrize(
    ("settings", "trains"),
    [
        ({}, True),
        ({"test": True}, False),
        ({"test": True, "train": True}, True),
        ({"train": False}, False),
    ],
)
def test_training_is_the_default_unless_only_test_is_set(
    settings: dict[str, Any], trains: bool
) -> None:
    assert TrainConfig(**settings).trains == trains


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_every": 0}, "rank_every must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"iters": 1.5}, r"iters must be a whole number, got 1\.5"),
        ({"iters": True}, "iters must be a whole number, got True"),
        ({"val_batches": -2}, "val_batches must be -1 or at least 0, got -2"),
        ({"test_batches": 0}, "test_batches must be -1 or at least 1"),
        ({"max_seq_length": 1}, "max_seq_length must be at least 2, got 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"seed": 2**64}, "seed must be at least 0 and below"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"learning_rate": "1e-5"}, "must be a finite number above 0, got .1e-5."),
        ({"optimizer": "lion"}, "optimizer must be adam, .* or adafactor, got 'lion'"),
        ({"fine_tune_type": "qlora"}, "must be dora, lora or full, got .qlora."),
        ({"lr_schedule": "cosine"}, "lr_schedule must be a mapping, got 'cosine'"),
        ({"report_to": "wandb,x"}, "report_to knows wandb and swanlab, not x"),
        ({"prompt_feature": ""}, "prompt_feature must be the name of a key"),
        ({"hf_dataset": {"name": "x"}}, "hf_dataset needs a mapping with the key"),
    ],
)
def test_bad_values_are_one_line_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DoRAError, match=message) as info:
        TrainConfig(**settings)
    assert "\n" not in str(info.value)
