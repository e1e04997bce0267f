"""The table of methods: its entries, and the texts generated from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_dora import DoRAError
from mlx_dora.cli.merge import command
from mlx_dora.merge import merge_adapters, merge_models
from mlx_dora.merge.methods import MERGEKIT, METHODS, method_named
from mlx_dora.merge.methods.page import TABLES, put_tables
from mlx_dora.merge.models import plan_models, read_mergekit
from tests.merge.models.test_merge import MATRIX, read

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_names_functions_that_exist(name: str) -> None:
    entry = METHODS[name]
    assert entry.rows or entry.blocks
    for where, get in (("rows", "row"), ("whole", "whole"), ("blocks", "block")):
        if getattr(entry, where):
            assert callable(getattr(entry, f"{get}_function"))


def test_only_the_table_compares_method_names() -> None:
    """No code outside the table compares the name of a method."""
    result = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "mlx_dora" / "merge").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        for compared in ("method == ", "method != ", "method in ", "method not in ")
        if compared in line
    ]
    assert result == []


def test_the_docs_page_contains_the_tables() -> None:
    page = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    for table in TABLES:
        assert table() in page, "run: python -m mlx_dora.merge.methods.page"
    assert put_tables(page) == page


def test_help_lists_the_default_densities() -> None:
    for verb in ("adapters", "models"):
        text = " ".join(CliRunner().invoke(command, [verb, "--help"]).output.split())
        assert "(default: ties 0.2, dare 0.5, dare_ties 0.5, breadcrumbs 0.9" in text
        assert "karcher, nmean" in text


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_models_have_the_default_density_of_adapters(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    base, first = (make_tiny_folder(f"m{seed}", seed=seed) for seed in range(2))
    kw: dict[str, Any] = {"base": base, "method": method}
    merge_models([first], save_path=tmp_path / "out", **kw)
    kept = read(tmp_path / "out", MATRIX) != read(base, MATRIX)
    assert kept.mean() == pytest.approx({"ties": 0.2, "dare": 0.5}[method], abs=0.04)
    density = {"density": METHODS[method].density}
    merge_models([first], save_path=tmp_path / "again", parameters=density, **kw)
    assert (read(tmp_path / "again", MATRIX) == read(tmp_path / "out", MATRIX)).all()


def test_dare_at_density_1_reports_that_it_drops_nothing() -> None:
    kw: dict[str, Any] = {"base": "b", "method": "dare"}
    plan = plan_models(["a"], parameters={"density": 1.0}, **kw)
    assert plan.notes == ("dare with density 1 drops nothing.",)
    assert plan_models(["a"], **kw).notes == ()
    entry = {"model": "a", "parameters": {"weight": 1}}
    config = {"merge_method": "dare_linear", "base_model": "b", "models": [entry]}
    assert read_mergekit(config).notes == plan.notes  # mergekit's default


def test_settings_without_effect_are_refused(tiny_model: Any) -> None:
    for parameters, message in (
        ({"density": 0.5}, "density has no effect on slerp; it uses only weights"),
        ({"lambda": 2.0}, "lambda has no effect on slerp"),
    ):
        with pytest.raises(DoRAError, match=message):
            plan_models(["a", "b"], parameters=parameters)
    with pytest.raises(DoRAError, match="lambda has no effect on karcher"):
        merge_adapters(["a", "b"], model=tiny_model, method="karcher", scale=2.0)
    with pytest.raises(DoRAError, match="density has no effect on nmean"):
        merge_adapters(["a", "b"], model=tiny_model, method="nmean", density=0.2)


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(
        DoRAError, match=f"no merge method 'best': {', '.join(METHODS)}"
    ):
        method_named("best")


def test_mergekits_names_are_unique_and_read(tmp_path: Path) -> None:
    kits = [kit.name for entry in METHODS.values() for kit in entry.mergekit]
    assert len(kits) == len(set(kits)) == len(MERGEKIT)
    for name, (kit, entry) in MERGEKIT.items():
        fewest = kit.inputs[0] if kit.inputs else entry.inputs[0]
        models = [{"model": f"m{i}"} for i in range(fewest)]
        config: dict[str, Any] = {"merge_method": name, "models": models}
        if entry.needs_base:
            config["base_model"] = "base"
        if kit.starts_at_base:
            config["base_model"] = "m0"
        assert read_mergekit(json.loads(json.dumps(config))).method == entry.name
