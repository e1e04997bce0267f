from pathlib import Path
from typing import Any

from mlx_dora import DoRAConfig
from mlx_dora.cli._train_text import (
    count,
    describe_start,
    describe_training,
    next_commands,
    resume_command,
)
from mlx_dora.train import TrainConfig, TrainReport


def report(**extra: Any) -> TrainReport:
    return TrainReport(
        adapter_path=Path("out"),
        steps=7,
        modules=("a", "b"),
        trainable_parameters=1_500_000,
        train_loss=1.0,
        trained_tokens=12_345,
        seconds=3725.0,
        peak_memory_bytes=2_500_000_000,
        **extra,
    )


def test_a_training_by_reward_counts_prompts_and_rewards() -> None:
    train = TrainConfig(model="m", objective="grpo", batch_size=3, adapter_path="a")
    lines = describe_start(train, DoRAConfig())
    assert "steps of 3 prompts, " in lines[1]
    assert "validation loss: minus the mean reward" in lines[2]
    assert not any("evaluate" in line for line in next_commands(train))
    other = TrainConfig(model="m", adapter_path="a")
    assert any("evaluate" in line for line in next_commands(other))


def test_summary_reports_the_training() -> None:
    lines = describe_training(
        report(first_val_loss=2.0, val_loss=1.5, rows_truncated=3)
    )
    assert lines == [
        "Trained 7 steps: 12,345 target tokens, 1:02:05, peak memory 2.50 GB.",
        "Validation loss 2.0000 before, 1.5000 after.",
        "Training rows cut: 3; skipped without a target: 0.",
        "Adapter: out",
    ]
    assert len(describe_training(report())) == 2


def test_the_start_names_the_size_of_a_batch() -> None:
    dora = DoRAConfig()
    rows = describe_start(TrainConfig(model="m", batch_size=3), dora)
    tokens = describe_start(TrainConfig(model="m", batch_tokens=4096), dora)
    assert "1000 steps of 3 rows, adam" in rows[1]
    assert "1000 steps of up to 4,096 tokens, adam" in tokens[1]


def test_one_of_a_kind_is_in_the_singular() -> None:
    train = TrainConfig(model="m", batch_size=1, iters=1)
    line = describe_start(train, DoRAConfig(num_layers=1))[1]
    assert "in the last block; 1 step of 1 row, adam" in line
    assert count(2, "step") == "2 steps"


def test_next_commands_are_quoted_for_the_shell() -> None:
    train = TrainConfig(model="my model", adapter_path="out 1/", data="d")
    assert next_commands(train) == [
        "mlx_dora.generate --adapter-path 'out 1/' --prompt Hello",
        "mlx_dora.evaluate --adapter-path 'out 1/' --data d",
        "mlx_dora.fuse --adapter-path 'out 1/' --save-path 'out 1-fused'",
    ]


def test_next_commands_read_the_data_as_the_training_did() -> None:
    train = TrainConfig(
        model="m", data="d", mask_prompt=True, prompt_feature="q?", max_seq_length=99
    )
    assert next_commands(train, chats=True)[1:3] == [
        "mlx_dora.chat --adapter-path adapters",
        "mlx_dora.evaluate --adapter-path adapters --data d --mask-prompt "
        "--prompt-feature 'q?' --max-seq-length 99",
    ]
    without = next_commands(train, evaluates=False)
    assert not any("evaluate" in line or "chat" in line for line in without)


def test_the_resume_command_is_the_command_with_resume() -> None:
    words = ["mlx_dora.train", "--model", "my model", "--overwrite", "-q"]
    assert resume_command(words) == "mlx_dora.train --model 'my model' -q --resume"
    assert resume_command(["mlx_dora.train", "--resume"]) == "mlx_dora.train --resume"
