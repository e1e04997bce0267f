"""What a package index and Homebrew get, and that every file names the same version."""

import hashlib
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mlx_dora

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "packaging" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(monkeypatch: pytest.MonkeyPatch, repository: str | None) -> dict[str, Any]:
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    monkeypatch.setenv("GITHUB_REF_NAME", "v1")
    if repository is None:
        monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    else:
        monkeypatch.setenv("GITHUB_REPOSITORY", repository)
    metadata: dict[str, Any] = {}
    script("metadata").CustomMetadataHook(str(ROOT), {}).update(metadata)
    return metadata


def test_a_hosted_build_has_links_that_an_index_can_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata = filled(monkeypatch, "a/b")
    assert metadata["urls"]["Homepage"] == "https://github.com/a/b"
    text = metadata["readme"]["text"]
    assert "](https://github.com/a/b/blob/v1/docs/README.md)" in text
    assert "![The terminal of the demo](https://github.com/a/b/raw/v1/docs/" in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [link for link in links if not link.startswith(("https:", "#"))] == []


def test_a_local_build_keeps_the_readme_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metadata = filled(monkeypatch, None)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["readme"]["text"] == readme
    assert "urls" not in metadata


def test_the_formula_names_version_and_digest_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "mlx_dora-9.8.7-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    text = script("formula").formula(wheel)
    assert "mlx_dora-9.8.7-py3-none-any.whl" in text
    assert f'sha256 "{hashlib.sha256(b"wheel").hexdigest()}"' in text
    assert "@" not in re.sub(r'"python@[\d.]+"', "", text)


def test_every_file_names_the_same_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mlx_dora.__version__}\n" in citation
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d[\d.]*)", changelog, re.M)[0] == mlx_dora.__version__


def test_this_python_is_among_the_classifiers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    own = (
        f"Programming Language :: Python :: {sys.version_info[0]}.{sys.version_info[1]}"
    )
    assert own in project["project"]["classifiers"]
