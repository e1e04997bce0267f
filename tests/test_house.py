"""What stands once in the package stands once, and layers stay shallow."""

import ast
import re
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_dora"
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def places(pattern: str) -> list[str]:
    """The file of each match of a pattern in the package."""
    return [name for name, text in SOURCES.items() for _ in re.findall(pattern, text)]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}::{node.name}", node


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's statements: without its signature and docstring."""
    first = node.body[ast.get_docstring(node) is not None :]
    return (node.end_lineno or 0) - first[0].lineno + 1 if first else 0


def called(node: ast.AST) -> set[str]:
    calls = (one.func for one in ast.walk(node) if isinstance(one, ast.Call))
    return {getattr(one, "attr", getattr(one, "id", "")) for one in calls}


@pytest.mark.parametrize(
    ("pattern", "home"),
    [
        (r"2 \* (?:self\.)?s(?:cale)?\b", "matrix/terms.py"),  # n² = q0 + 2s·c + s²·p
        (r"2(?:\.0)?\*\*-6\b", "matrix/terms.py"),  # the bound of cancellation
        (r"2(?:\.0)?\*\*-20\b", "matrix/terms.py"),  # the floor of training
        (r"\(\w+ @ \w*gram\w*\) \* \w+\)\.sum\(", "matrix/low_rank.py"),  # p
        (r"jii->ji", "matrix/grams.py"),  # lengths from Gram matrices
        (
            r'"ij,ij->i", first, second',
            "matrix/weight.py",
        ),  # products of rows, in float32 and float64
    ],
)
def test_an_equation_stands_once(pattern: str, home: str) -> None:
    assert places(pattern) == [home]


def test_the_spectrum_of_a_low_rank_update_stands_once() -> None:
    both = [name for name, node in functions() if {"qr", "svd"} <= called(node)]
    assert both == ["matrix/low_rank.py::_svd"]


def test_one_function_reads_w0_for_squares_and_products() -> None:
    found = [
        name
        for name, node in functions()
        if "row_blocks" in called(node)
        and any(isinstance(one, ast.MatMult) for one in ast.walk(node))
        and "squared_rows" in called(node)
    ]
    assert found == ["matrix/weight.py::base_products"]


def test_only_the_matrix_looks_at_the_packing() -> None:
    looks = places(r"isinstance\([^()]*QuantizedWeight")
    assert len([name for name in looks if not name.startswith("matrix/")]) <= 3


@pytest.mark.parametrize("room", ["matrix", "kernels", "layers"])
def test_a_function_fits_on_a_screen(room: str) -> None:
    long = [
        name
        for name, node in functions()
        if name.startswith(room) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []


def test_no_function_has_more_than_60_lines_of_statements() -> None:
    lengths = [(name, body_lines(node)) for name, node in functions()]
    assert len(lengths) > 2000
    assert [(name, lines) for name, lines in lengths if lines > 60] == []


def depth(name: str, bases: dict[str, list[str]]) -> int:
    """How far below `nn.Module` a class is; 0 for one that is no module."""
    if name in ("nn.Module", "Module"):
        return 0
    found = []
    for base in bases.get(name, []):
        if base == "nn.Module":
            found.append(1)
        elif base.startswith("nn."):
            found.append(2)
        elif below := depth(base, bases):
            found.append(below + 1)
    return max(found, default=0)


def test_no_module_is_deeper_than_two_classes() -> None:
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for text in SOURCES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    }
    depths = {name: depth(name, bases) for name in bases}
    assert depths["DoRALayer"] == 1
    assert depths["DoRALinear"] == 2
    assert {name for name, found in depths.items() if found > 2} == set()


def count_calls() -> Any:
    path = ROOT / "benchmarks" / "count_calls.py"
    spec = util.spec_from_file_location("count_calls", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_forward_within_a_training_step_is_eight_calls_in_five_files() -> None:
    calls = count_calls().forward_calls()
    for how, most, files in (("step", 8, 5), ("eval", 8, 5), ("alone", 18, 8)):
        assert len(calls[how]) <= most
        assert len({file for file, _ in calls[how]}) <= files
    assert calls["step"][0] == ("layers/linear.py", "__call__")


def test_a_matrix_of_an_adapter_merge_is_120_calls_in_ten_files() -> None:
    found = count_calls().merge_calls()
    assert found["calls"] <= 120
    assert len(found["files"]) <= 10


def test_a_rank_reaches_a_layer_through_six_files() -> None:
    assert len(count_calls().count_rank()["journey"]) <= 6
