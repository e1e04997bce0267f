import json
import subprocess
import sys
from pathlib import Path

from mlx_dora.demo.data import demo_rows, write_demo_data


def test_there_are_a_few_hundred_rows_with_short_answers() -> None:
    splits = demo_rows()
    assert len(splits["train"]) > 500
    assert min(len(splits["valid"]), len(splits["test"])) > 80
    for row in (row for rows in splits.values() for row in rows):
        assert 20 <= len(row.answer) <= 140
        assert row.answer.endswith(".")
        assert "\n" not in row.answer
        assert " at 0x" not in row.question


def test_no_module_and_no_answer_is_in_two_splits() -> None:
    splits = demo_rows()
    modules = [{row.module for row in rows} for rows in splits.values()]
    assert len(set.union(*modules)) == sum(map(len, modules))
    answers = [row.answer for rows in splits.values() for row in rows]
    assert len(answers) == len(set(answers))


def test_another_process_makes_the_same_files(tmp_path: Path) -> None:
    counts = write_demo_data(tmp_path / "here")
    code = (
        "import sys; from mlx_dora.demo.data import write_demo_data;"
        "write_demo_data(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=root)
    for name, count in counts.items():
        here = (tmp_path / "here" / f"{name}.jsonl").read_bytes()
        assert here == (tmp_path / "there" / f"{name}.jsonl").read_bytes()
        rows = [json.loads(line) for line in here.decode().splitlines()]
        assert len(rows) == count
        roles = [message["role"] for message in rows[0]["messages"]]
        assert roles == ["user", "assistant"]


def test_python_without_docstrings_is_refused() -> None:
    code = (
        "from mlx_dora.demo.data import demo_rows; from mlx_dora.errors import *\n"
        "try: demo_rows()\nexcept DoRAError as e: print(e)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-OO", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert "-OO" in done.stdout
