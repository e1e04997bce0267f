import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlx_dora.adapters.adapter import take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import load
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.fuse.model import fuse_model
from mlx_dora.io.hub_id import hub_id
from mlx_dora.publish.card import adapter_card, fused_card
from mlx_dora.publish.markdown import block, inline, table, without_folders
from mlx_dora.publish.metadata import card_data
from mlx_dora.publish.names import name_of

LICENSED = """---
license: other
license_name: fun
license_link: LICENSE
language: [en, de]
tags: [llama, mlx]
base_model: other/thing
model-index: 3
---
# Base
"""


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def snapshot(make_tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A base in the Hub's cache, with a card."""
    folder = tmp_path / "hub" / "models--org--tiny-lm" / "snapshots" / "1a2b3c"
    folder.parent.mkdir(parents=True)
    make_tiny_folder().rename(folder)
    (folder / "README.md").write_text(LICENSED)
    return folder


@pytest.fixture
def adapter(snapshot: Path, tmp_path: Path) -> Path:
    model, _ = load(snapshot)
    apply_dora(model, DoRAConfig(rank=2, num_layers=1))
    training = {"iters": 3, "train_loss": 2.5, "val_loss": 1.5, "lr_schedule": None}
    saved = replace(take_adapter(model), training=training)
    save_adapter(saved, tmp_path / "adapter", base_model=str(snapshot))
    return tmp_path / "adapter"


def test_a_card_extends_that_of_a_cached_base_and_hides_every_path(
    adapter: Path, snapshot: Path, tmp_path: Path
) -> None:
    data = tmp_path / "secret" / "mine.jsonl"
    command = ["mlx_dora.train", "--model", str(snapshot), f"-c{tmp_path}/x/a.yaml"]
    command += ["--data", str(data), f"--adapter-path={adapter}"]
    card = adapter_card(adapter, str(snapshot), command, [str(data)])
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert head_of(card) == {
        "base_model": "org/tiny-lm",
        "base_model_relation": "adapter",
        "language": ["en", "de"],
        "library_name": "mlx",
        "license": "other",
        "license_name": "fun",
        "license_link": "https://huggingface.co/org/tiny-lm/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "mlx", "dora", "mlx_dora"],
    }
    words = "--model org/tiny-lm -ca.yaml --data mine.jsonl --adapter-path=adapter"
    assert f"\nmlx_dora.train {words}\n" in card
    assert "| data | mine.jsonl |" in card
    assert "| rank | 2 |" in card
    assert "lr_schedule" not in card  # not set
    assert "| validation loss | 1.5 |" in card
    assert f"| validation perplexity | {math.exp(1.5):.6g} |" in card
    assert "\nhf download USER/NAME --local-dir adapter\n" in card
    assert "mlx_lm.generate --model org/tiny-lm --adapter-path adapter " in card


def test_data_sets_and_results_on_the_hub_are_metadata(
    adapter: Path, snapshot: Path, tmp_path: Path
) -> None:
    card = adapter_card(adapter, str(snapshot), ["x"], ["org/chat"], "me/poet")
    head = head_of(card)
    assert head["datasets"] == ["org/chat"]
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"]["type"] == "org/chat"
    assert result["metrics"] == [{"type": "perplexity", "value": math.exp(1.5)}]
    assert "hf download me/poet --local-dir adapter" in card
    # The card of the fused model takes them from the card of the adapter.
    (adapter / "README.md").write_text(card)
    report = fuse_model(snapshot, adapter, tmp_path / "fused")
    fused = fused_card(adapter, str(snapshot), report, ["x"], "me/fused")
    assert head_of(fused)["datasets"] == ["org/chat"]
    assert head_of(fused)["base_model_relation"] == "finetune"
    assert "mlx_lm.generate --model me/fused " in fused


def test_a_card_says_nothing_of_a_base_without_card_or_id(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    data = card_data(str(tmp_path / "base"), "lora", "adapter", [str(tmp_path)], 2.0)
    assert data.to_dict() == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "lora", "mlx_dora"],
    }


@pytest.mark.parametrize(
    "content", [b"---\n- a\n---\n", b"---\na: [\n---\n", b"---\xff"]
)
def test_a_damaged_card_of_the_base_is_left_out_with_a_warning(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with caplog.at_level(logging.WARNING, "mlx_dora"):
        assert card_data(str(tmp_path), "dora", "adapter").license is None
    assert "takes over nothing" in caplog.text


def test_losses_that_are_not_numbers_are_left_out(
    adapter: Path, snapshot: Path
) -> None:
    path = adapter / "adapter_config.json"
    content = json.loads(path.read_text())
    content["mlx_dora"]["training"] |= {"train_loss": "<b>", "val_loss": 1e300}
    path.write_text(json.dumps(content))
    card = adapter_card(adapter, str(snapshot), ["x"], [])
    assert "training loss" not in card
    assert "| validation loss | 1e+300 |" in card
    assert "perplexity |" not in card


def test_a_name_is_plain_text_in_a_table() -> None:
    assert inline("a|b\n| c |") == r"a\|b\\n\| c \|"
    assert inline("<img src=x>") == r"\<img src=x\>"
    assert inline("[a](javascript:b)") == r"\[a\](javascript:b)"
    assert inline("*a* `b` _c_ max_seq") == r"\*a\* \`b\` \_c\_ max_seq"


def test_the_content_of_a_block_cannot_end_it() -> None:
    text = block("mlx_dora.train\n```\n# Title\x1b[2J")
    lines = text.split("\n")
    assert lines[0] == lines[-1] == "````"
    assert lines[1:-1] == ["mlx_dora.train", "```", r"# Title\x1b[2J"]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--model", "/home/me/models/base"], "--model base"),
        (["--model=/home/me/models/base/"], "--model=base"),
        (["--data", "~/my data/chat"], "--data chat"),
        (["-c", "../configs/a.yaml"], "-c a.yaml"),
        (["--model", "org/model"], "--model org/model"),
        (["--data", "{train: /home/me/a.jsonl}"], "--data '{train: a.jsonl}'"),
        (["--rank", "8", "--learning-rate", "1e-5"], "--rank 8 --learning-rate 1e-5"),
        (["--note", "https://example.org/a/b"], "--note https://example.org/a/b"),
    ],
)
def test_a_command_names_paths_without_their_folders(
    words: list[str], shown: str
) -> None:
    assert without_folders(words) == shown


def test_a_folder_that_exists_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_of("org/model") == "model"
    assert hub_id("org/model") is None
    assert hub_id("org/other") == "org/other"


def test_numbers_lists_and_paths_in_a_table() -> None:
    rows = [["a|b", [0.9, 0.9999999]], ["c", {"d": "/home/me/x"}]]
    lines = table(["e", "f"], rows).split("\n")
    assert lines[2:] == [r"| a\|b | 0.9, 1 |", "| c | d x |"]


@pytest.mark.parametrize("base", ['org/a"\nlicense: mit', "org/a: b", "org/#x", "- x"])
def test_a_name_that_is_no_hub_id_is_not_recorded(base: str) -> None:
    data = card_data(base, "dora", "adapter").to_dict()
    assert "base_model" not in data
    assert "license" not in data
