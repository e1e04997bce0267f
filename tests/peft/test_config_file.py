"""Values in PEFT's ``adapter_config.json``: each bad value is reported in one line."""

import logging
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.cli.convert import command
from mlx_dora.errors import DoRAError
from mlx_dora.peft import from_peft, to_peft
from tests.adapters.folders import edit_config

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return PEFT's folder of a LoRA with rank 4 on one module."""
    tensors = {f"{PATH}.lora_a": mx.ones((32, 4)), f"{PATH}.lora_b": mx.ones((4, 32))}
    config = DoRAConfig(rank=4, scale=2.0, keys=(PATH,))
    adapter = Adapter(config=config, tensors=tensors, fine_tune_type="lora")
    to_peft(adapter, tmp_path / "peft")
    return tmp_path / "peft"


REPORT_20: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, r"r must be at least 1, got 0"),
    ({"rank_pattern": {"*q_proj": 4}}, r"'\*q_proj' is not a regular .* '\.\*q_proj'"),
    (
        {"target_modules": "*.q_proj"},
        r"'\*\.q_proj' is not a regular .* '\.\*\.q_proj'",
    ),
    ({"rank_pattern": [1]}, r"rank_pattern must be a mapping, got \[1\]"),
]
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    *REPORT_20,
    ({"r": -1}, "r must be"),
    ({"r": True}, "r must be"),
    ({"r": "8"}, "r must be"),
    ({"r": 4.0}, "r must be"),
    ({"r": None}, "r must be"),
    ({"lora_alpha": "8"}, "lora_alpha must be a finite number"),
    ({"lora_alpha": 10**400}, "is too large a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
    ({"lora_alpha": None}, "lora_alpha must be a finite number"),
    ({"lora_dropout": 1.5}, "lora_dropout must be at least 0 and below 1"),
    ({"lora_dropout": "x"}, "lora_dropout must be"),
    ({"use_dora": "false"}, "use_dora must be true or false"),
    ({"use_rslora": 1}, "use_rslora must be true or false"),
    ({"rank_pattern": "x"}, "rank_pattern must be a mapping"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern 'q_proj' must be"),
    ({"rank_pattern": {"q_proj": [4]}}, r"rank_pattern 'q_proj' must be"),
    ({"alpha_pattern": {"q_proj": "4"}}, r"alpha_pattern 'q_proj' must be"),
    ({"alpha_pattern": {"q(": 4}}, r"'q\(' is not a regular expression"),
    ({"alpha_pattern": {"(a+)+b": 4}}, "could take forever"),
    ({"target_modules": "(a|b)*c"}, "could take forever"),
    ({"target_modules": 5}, "target_modules must be text or a list of texts"),
    ({"target_modules": ["q_proj", 5]}, "target_modules must be text or a list"),
    ({"target_modules": {"q_proj": 1}}, "target_modules must be text or a list"),
    ({"exclude_modules": "["}, r"'\[' is not a regular expression"),
    ({"layers_to_transform": "0"}, "layers_to_transform must be"),
    ({"layers_to_transform": [0.5]}, "layers_to_transform must be"),
    ({"layers_pattern": 3}, "layers_pattern must be"),
    ({"layers_pattern": ["("]}, "layers_pattern .* is not a regular expression"),
    ({"peft_type": ["LORA"]}, "LORA is supported"),
    ({"bias": "lora_only"}, "trained biases"),
    ({"use_new_thing": True}, "use_new_thing = True .unknown to mlx_dora"),
]


@pytest.mark.parametrize(("change", "message"), BAD_VALUES, ids=repr)
def test_report_20_a_bad_value_is_named(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(folder, **change)
    with pytest.raises(DoRAError, match=message):
        from_peft(folder)


@pytest.mark.parametrize(("change", "message"), REPORT_20, ids=repr)
def test_report_20_the_command_reports_it_in_one_line(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(folder, **change)
    args = [str(folder), str(tmp_path / "out"), "--to", "mlx", "-q"]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 1
    assert re.search(message, result.output)
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_all_bad_values_are_named_at_once(folder: Path) -> None:
    edit_config(folder, r=0, lora_dropout=2, alpha_pattern={"*": 1})
    with pytest.raises(DoRAError, match=r"r must.*; lora_dropout must.*; alpha_patt"):
        from_peft(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 9999, '{"a": 1}', "\xff"]
)
def test_a_file_that_is_not_a_config_is_refused(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DoRAError, match=r"adapter_config\.json"):
        from_peft(folder)


def test_a_byte_order_mark_is_skipped(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert from_peft(folder).paths == [PATH]


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": None, "alpha_pattern": None, "lora_dropout": None},
        {"layers_to_transform": 0, "target_modules": ["q_proj"]},
        {
            "layers_to_transform": [0],
            "layers_pattern": "layers",
            "target_modules": ["q_proj"],
        },
        {"target_modules": r".*\.layers\.(0|1)\..*(q|v)_proj"},
        {"target_modules": "all-linear", "bias": None},
        {"use_qalora": False, "use_new_thing": False, "new_config": None},
    ],
    ids=repr,
)
def test_values_that_peft_accepts_are_read(
    folder: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(folder, **change)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        assert from_peft(folder).paths == [PATH]
    assert caplog.text == ""


def test_unknown_keys_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, new_config={"a": 1}, new_number=3, new_switch=False)
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        from_peft(folder)
    assert "does not know and ignores: new_config, new_number" in caplog.text
    assert "new_switch" not in caplog.text
