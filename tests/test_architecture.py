"""The layering of the design, read from every import; see docs in CONTRIBUTING.md.

cli > demo | doctor | publish | serve > train | analyze | merge | export > evaluate >
data | fuse | peft > adapters > layers > decomposition > kernels | io > matrix >
notebook | options > errors | lazy | openblas | progress

Imports point right; packages joined by | never import each other; `page`
stands beside `io`.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import mlx_dora

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("cli",),
    ("demo", "doctor", "publish", "serve"),
    ("train", "analyze", "merge", "export"),
    ("evaluate",),
    ("data", "fuse", "peft"),
    ("adapters",),
    ("layers",),
    ("decomposition",),
    ("kernels", "io", "page"),
    ("matrix",),
    ("notebook", "options"),
    ("errors", "lazy", "openblas", "progress"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAX_LINES = 400
VAGUE_NAMES = {"utils", "helpers", "misc"}
LAZY_ONLY = {"mlx_lm", "transformers"}  # slow to import
# Their classes extend those of mlx-lm's server, so only functions import them.
MAY_IMPORT_EAGERLY = {
    f"mlx_dora/serve/{name}.py"
    for name in ("batch", "host", "many", "prompt_cache", "sampling")
}
BOUNDARY = "mlx_dora/io/foreign.py"  # catches all that code of others raises


def is_entry_point(path: PurePosixPath) -> bool:
    """``__main__.py``: of the package, and of a room that is a command."""
    return path.name == "__main__.py"


def imports(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported module of a file, those inside functions and strings too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield node, resolve(node.module or "", alias.name)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            target = node.args[0]
            is_import = name in ("import_module", "__import__")
            if is_import and isinstance(target, ast.Constant):
                yield node, str(target.value)


def resolve(module: str, name: str) -> str:
    """Where ``from module import name`` leads: a public name to its own file."""
    if module == "mlx_dora":
        home = getattr(mlx_dora, "_HOME", {}).get(name)
        return home or (f"mlx_dora.{name}" if name in RANK else module)
    return f"{module}.{name}" if module.startswith("mlx_dora.") else module


def eager_nodes(tree: ast.Module) -> set[ast.AST]:
    """What runs when the module is imported: not functions, not TYPE_CHECKING."""
    found: set[ast.AST] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        found.add(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def import_problems(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    own = path.with_suffix("").parts[1] if len(path.parts) > 1 else ""
    own = "" if own == "__init__" else own
    eager = eager_nodes(tree)
    for node, target in imports(tree):
        top, *rest = target.split(".")
        if top in LAZY_ONLY and node in eager and str(path) not in MAY_IMPORT_EAGERLY:
            yield f"imports {top} at module level"
        if top == "mlx" and node in eager and own in ("", "openblas", "errors"):
            yield "imports mlx at module level"
        if top == "click" and own != "cli":
            yield "imports click outside cli"
        if top != "mlx_dora" or not rest or not own or own == rest[0]:
            continue
        if is_entry_point(path):
            if rest[0] != "cli":
                yield f"is an entry point but imports {target}"
            continue
        if rest[0] not in RANK:
            yield f"imports {target}, which no layer holds"
        elif RANK[rest[0]] < RANK[own]:
            yield f"imports {target}: upwards"
        elif RANK[rest[0]] == RANK[own]:
            yield f"imports {target}: sideways"
        if any(part.startswith("_") for part in rest[1:2]):
            yield f"imports {target}, private to its folder"


def init_problems(tree: ast.Module, *, is_top: bool) -> Iterator[str]:
    """An ``__init__.py`` holds a docstring, imports and tables; the top one is lazy."""
    plain = (ast.Import, ast.ImportFrom)
    for node in tree.body:
        is_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node)
        is_lazy = " = public_names(__name__, _HOME" in ast.unparse(node)
        is_table = isinstance(node, ast.Assign | ast.AnnAssign) and not any(
            isinstance(inner, ast.Call) for inner in ast.walk(node)
        )
        is_preload = ast.unparse(node) == "preload()"  # the BLAS, before MLX
        known = is_doc or is_types or is_lazy or is_table or is_preload
        if not (isinstance(node, plain) or known):
            yield f"has logic in __init__.py, line {node.lineno}"


def problems(name: str, source: str) -> list[str]:
    """What is wrong with one file, given its path from the repository's root."""
    path = PurePosixPath(name)
    tree = ast.parse(source)
    found = []
    if path.stem.lstrip("_") in VAGUE_NAMES:
        found.append("has a name that says nothing")
    lines = source.count("\n")
    if lines > MAX_LINES:
        found.append(f"has {lines} lines, at most {MAX_LINES} are allowed")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append("has a relative import")
    if path.parts[0] != "mlx_dora":
        return found
    own = path.with_suffix("").parts[1]
    if own not in RANK and not is_entry_point(path) and own != "__init__":
        return [*found, "is in no layer"]
    found += import_problems(path, tree)
    if path.name == "__init__.py":
        found += init_problems(tree, is_top=len(path.parts) == 2)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            last = node.body[-1]
            if isinstance(last, ast.Raise) and last.exc is None:
                continue  # it tidies up and passes the error on
            if caught == "Exception" and str(path) == BOUNDARY:
                continue
            if caught in ("everything", "Exception", "BaseException"):
                found.append(f"catches {caught}")
    return found


@functools.cache
def source_files() -> list[str]:
    folders = ("mlx_dora", "tests", "benchmarks", "examples")
    files = (file for name in folders for file in (ROOT / name).rglob("*.py"))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def room(name: str) -> str:
    """The top folder of a file; within the package and the tests, the folder below."""
    return "/".join(PurePosixPath(name).parts[:-1][:2])


@pytest.mark.parametrize("where", sorted({room(name) for name in source_files()}))
def test_files_keep_the_architecture(where: str) -> None:
    wrong = {
        name: problems(name, (ROOT / name).read_text(encoding="utf-8"))
        for name in source_files()
        if room(name) == where
    }
    assert wrong
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("io/a.py", "from mlx_dora.layers import x", "upwards"),
        ("io/a.py", "def f():\n    from mlx_dora.layers import x", "upwards"),
        ("io/a.py", "import mlx_dora.adapters.config", "upwards"),
        ("io/a.py", "from mlx_dora import DoRALinear", "upwards"),
        ("io/a.py", "from mlx_dora import layers", "upwards"),
        ("io/a.py", "import_module('mlx_dora.layers')", "upwards"),
        ("io/a.py", "from mlx_dora.kernels import x", "sideways"),
        ("kernels/a.py", "from mlx_dora.io.header import x", "sideways"),
        ("merge/a.py", "from mlx_dora.analyze import x", "sideways"),
        ("analyze/a.py", "from mlx_dora.train.config import x", "sideways"),
        ("errors.py", "from mlx_dora.openblas import preload", "sideways"),
        ("evaluate/a.py", "from mlx_dora.train import x", "upwards"),
        ("train/a.py", "from mlx_dora.cli.train import command", "upwards"),
        ("matrix/a.py", "from mlx_dora.kernels import x", "upwards"),
        ("io/a.py", "from mlx_dora.stack import x", "no layer holds"),
        ("layers/a.py", "from . import x", "relative"),
        ("layers/a.py", "from mlx_dora.kernels._source import x", "private"),
        ("layers/a.py", "import mlx_lm", "module level"),
        ("layers/a.py", "from transformers import x", "module level"),
        ("layers/a.py", "class A:\n    import mlx_lm.utils", "module level"),
        ("layers/a.py", "try:\n    import mlx_lm\nfinally:\n    pass", "module level"),
        ("__init__.py", "import mlx.core", "module level"),
        ("train/a.py", "def f():\n    import click", "click"),
        ("io/utils.py", "", "says nothing"),
        ("io/_helpers.py", "", "says nothing"),
        ("io/a.py", "x = 1\n" * 401, "401 lines"),
        ("io/__init__.py", "def f():\n    pass", "logic"),
        ("io/__init__.py", "x = open('a')", "logic"),
        ("io/__init__.py", "def __getattr__(name):\n    pass", "logic"),
        ("plots/a.py", "", "in no layer"),
        ("train/__main__.py", "import mlx_dora.adapters.files", "entry point"),
        ("generate.py", "from mlx_dora.cli.generate import x", "in no layer"),
        ("io/a.py", "try:\n    x\nexcept Exception:\n    pass", "catches Exception"),
        ("io/a.py", "try:\n    x\nexcept:\n    pass", "catches everything"),
    ],
)
def test_checker_finds_a_planted_violation(
    name: str, source: str, expected: str
) -> None:
    found = problems(f"mlx_dora/{name}", source)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli/a.py", "import click\nfrom mlx_dora.train.config import x"),
        ("cli/a.py", "from mlx_dora.cli._options import x"),
        ("cli/a.py", "import mlx.core as mx"),
        ("train/a.py", "from mlx_dora.evaluate.loss import x"),
        ("io/a.py", "from mlx_dora.errors import DoRAError\nimport mlx.core as mx"),
        ("io/a.py", "from mlx_dora import DoRAError, __version__"),
        ("io/a.py", "from mlx_dora.io._parse import x"),
        ("serve/host.py", "from mlx_lm import server"),
        ("adapters/a.py", "def f():\n    import mlx_lm"),
        ("adapters/a.py", "if TYPE_CHECKING:\n    import mlx_lm"),
        ("train/__main__.py", "from mlx_dora.cli.train import command"),
        ("io/__init__.py", '"""Doc."""\nfrom mlx_dora.io.a import x\n__all__ = ["x"]'),
        ("io/a.py", "x = 1\n" * 400),
        ("io/a.py", "try:\n    x\nexcept BaseException:\n    y()\n    raise"),
        ("io/foreign.py", "try:\n    x\nexcept Exception:\n    pass"),
    ],
)
def test_checker_accepts_what_is_allowed(name: str, source: str) -> None:
    assert problems(f"mlx_dora/{name}", source) == []
