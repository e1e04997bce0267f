from pathlib import Path

import pytest
import yaml

from mlx_dora.publish.card import _front_matter
from mlx_dora.publish.markdown import block, inline, name_of, without_folders


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


@pytest.mark.parametrize("base", ['org/a"\nlicense: mit', "org/a: b", "org/#x", "- x"])
def test_the_base_is_a_single_value_in_the_front_matter(base: str) -> None:
    head = yaml.safe_load(_front_matter(base, ["dora"]).strip("-\n"))
    assert head["base_model"] == base
    assert "license" not in head
