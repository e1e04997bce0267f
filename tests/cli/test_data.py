import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_dora.cli.data import command
from mlx_dora.data.formats import FORMATS


@pytest.fixture
def words(tiny_model_folder: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "pets.csv"
    rows = ["name it,dog,Rex\n", "name it,cat,\x1b[31mTom\n"]
    path.write_text("instruction,input,output\n" + "".join(rows))
    model = ["--model", str(tiny_model_folder), "--num-layers", "-1"]
    return [str(path), *model, "--mask-prompt"]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(command, words)


def test_targets_are_marked_and_everything_is_summed_up(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert (
        "  <|im_start|>user\n  name it\n  \n  dog<|im_end|>\n  <|im_start|>assistant\n"
        "  ⟦Rex<|im_end|>⟧\n" in result.stdout
    )
    assert "⟦\\x1b[31mTom<|im_end|>⟧" in result.stdout  # no control characters
    assert "train         2 " in result.stdout
    assert ", 33 tokens:" in result.stdout
    assert ", 38 tokens:" in result.stdout
    assert "Suggested: --max-seq-length 40 --batch-size 2" in result.stdout
    assert "meta-llama/Llama-3.1-8B-Instruct" in result.stdout
    assert result.stderr == (
        f"Reading {words[0]} ...\n"
        f"Data: 2 train rows ({words[0]}); Alpaca (instruction, output, input)\n"
    )


def test_everything_is_written_as_json_and_html(
    words: list[str], tmp_path: Path
) -> None:
    result = invoke(*words, "--json", "-")
    content = json.loads(result.stdout)
    (split,) = content["survey"]["splits"]
    assert (split["rows"], split["skipped"]) == (2, 0)
    kinds = [piece["kind"] for piece in split["samples"][0]["pieces"]]
    assert kinds == ["context", "target"]
    assert len(content["models"]) == 20
    both = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert invoke(*words, *both).exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert "<title>mlx_dora data</title>" in (tmp_path / "a.html").read_text()
    refused = invoke(*words, *both)
    assert refused.exit_code == 1
    assert "--overwrite" in refused.stderr
    assert invoke(*words, *both, "--overwrite").exit_code == 0


def test_cut_skipped_and_repeated_rows_are_listed(
    words: list[str], tmp_path: Path
) -> None:
    texts = [f"the fox {6 if number == 2 else number}" for number in range(10)]
    texts[7] = "the fox " * 9
    lines = [{"text": text} for text in texts]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = invoke(str(path), *words[1:-1], "--max-seq-length", "12", "--rows", "0")
    assert shown.exit_code == 0, shown.output
    assert f"{path}, line 8: cut, loses " in shown.stdout
    # Rows 2 and 6 are equal, and row 6 is held out.
    assert "Rows in two splits: 1\n" in shown.stdout


def test_wrong_use_and_bad_rows_are_one_line(words: list[str], tmp_path: Path) -> None:
    missing = invoke(words[0])
    assert missing.exit_code == 2
    assert "give --model" in missing.stderr
    Path(words[0]).write_text("instruction,input,output\na,b\n")
    bad = invoke(*words)
    assert bad.exit_code == 1
    assert "pets.csv, line 2: expected 3 cells" in bad.stderr
    assert invoke(str(tmp_path / "no" / "data"), *words[1:]).exit_code == 1


def test_the_help_lists_every_format() -> None:
    shown = " ".join(invoke("--help").stdout.split())
    for format in FORMATS:
        assert f"{format.title} (" in shown


def test_the_room_runs_as_a_module_and_stays_importable() -> None:
    import subprocess

    code = "import mlx_dora.data, sys; assert 'mlx_dora.cli' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_dora.data", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: mlx_dora.data")
