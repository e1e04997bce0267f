"""The dependencies in pyproject.toml are exactly what the package imports."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {"mlx_lm": "mlx-lm", "yaml": "pyyaml"}
"""Distributions by the module that they install, where the names differ."""
FEATURES = ("report", "data", "gguf")
"""Extras whose packages the package imports; the others hold tools or builds of MLX."""


def imports(text: str) -> Iterator[str]:
    """Yield the top-level modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            "import_module"
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value).partition(".")[0]


def test_imports_are_read_wherever_they_stand() -> None:
    text = "import a.b, c\ndef f():\n    from d.e import g\n    import_module('h.i')\n"
    assert list(imports(text)) == ["a", "c", "d", "h"]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[><=;! ]", entry)[0].lower() for entry in requirements]


def test_the_dependencies_are_what_the_package_imports(
    project: dict[str, Any],
) -> None:
    modules = {
        module
        for path in (ROOT / "mlx_dora").rglob("*.py")
        for module in imports(path.read_text(encoding="utf-8"))
    }
    modules -= {*sys.stdlib_module_names, "mlx_dora"}
    imported = {DISTRIBUTIONS.get(module, module) for module in modules}
    extras = project["optional-dependencies"]
    optional = {name for extra in FEATURES for name in names(extras[extra])}
    declared = set(names(project["dependencies"]))
    assert declared | optional == imported
    assert not declared & optional


def test_every_requirement_has_a_lower_bound(project: dict[str, Any]) -> None:
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    entries = [entry for requirements in lists for entry in requirements]
    assert [entry for entry in entries if ">=" not in entry] == []


def test_a_package_has_the_same_lower_bound_everywhere(project: dict[str, Any]) -> None:
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds: dict[str, set[str]] = {}
    for entry in (entry for requirements in lists for entry in requirements):
        name, bound = names([entry])[0], entry.partition(">=")[2].partition(";")[0]
        bounds.setdefault(name, set()).add(bound.strip())
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}
