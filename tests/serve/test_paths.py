from pathlib import Path

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.paths import NotServedError, ServedPaths

DEFAULT = "default_model"


@pytest.fixture
def served(tmp_path: Path) -> ServedPaths:
    """A root with a model, an adapter and links; and an adapter outside of it."""
    root = tmp_path / "root"
    for folder in (root / "poems", root / "deep" / "er", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    for folder in (root / "base", tmp_path / "own", tmp_path / "other"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (root / "way-out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("..")
    (root / "within").symlink_to(root / "poems")
    (root / "loop").symlink_to(root / "loop")
    (root / "empty").mkdir()
    (tmp_path / "root-beside").mkdir()
    (tmp_path / "root-beside" / "adapter_config.json").write_text("{}")
    own = str(tmp_path / "own")
    return ServedPaths(model=own, adapter="cli-adapter", root=root)


def root_of(served: ServedPaths) -> Path:
    assert served.root is not None
    return served.root


def test_a_request_that_names_nothing_gets_the_command_lines(
    served: ServedPaths,
) -> None:
    expected = (served.model, "cli-adapter", None)
    assert served.choose(DEFAULT, None, DEFAULT) == expected


@pytest.mark.parametrize("name", ["poems", "./poems", "within", "deep/../poems"])
def test_an_adapter_goes_with_the_default_model(name: str, served: ServedPaths) -> None:
    poems = str(root_of(served) / "poems")
    assert served.choose(DEFAULT, name, None) == (served.model, poems, None)
    assert served.choose(DEFAULT, poems, None) == (served.model, poems, None)


def test_a_named_model_has_the_adapter_that_is_named_and_no_other(
    served: ServedPaths,
) -> None:
    root = root_of(served)
    base, deep = str(root / "base"), str(root / "deep" / "er")
    assert served.choose("base", None, None) == (base, None, None)
    assert served.choose("base", "deep/er", "base") == (base, deep, base)
    assert served.choose(str(served.model), None, None) == (served.model, None, None)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "../root-beside",
        "poems/../../secret",
        "way-out",
        "up/secret",
        "/etc",
        "/",
        ".",
        "",
        "~",
        "loop",
        "empty",
        "base",  # a model
        "nothing",
        "poems/adapter_config.json",
        "a\0b",
        "a" * 5000,
    ],
)
def test_other_adapters_are_not_served(name: str, served: ServedPaths) -> None:
    with pytest.raises(NotServedError, match="is not served"):
        served.choose(DEFAULT, name, None)


@pytest.mark.parametrize("name", ["../other", "/etc", "poems", "org/model", "gpt2"])
def test_other_models_are_not_served(name: str, served: ServedPaths) -> None:
    with pytest.raises(NotServedError, match="is not served"):
        served.choose(name, None, None)
    with pytest.raises(NotServedError, match="is not served"):
        served.choose(DEFAULT, None, name)


def test_absolute_paths_outside_are_not_served(
    served: ServedPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotServedError):
        served.choose(DEFAULT, str(tmp_path / "secret"), None)
    monkeypatch.chdir(tmp_path)  # not what is in the current folder either
    with pytest.raises(NotServedError):
        served.choose("other", None, None)


def test_without_a_root_only_the_command_lines_are_served(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    served = ServedPaths(model="m", adapter=str(tmp_path))
    assert served.choose(DEFAULT, str(tmp_path), None)[1] == str(tmp_path)
    with pytest.raises(NotServedError, match="started without --adapter-root"):
        served.choose(DEFAULT, str(tmp_path / ".." / "x"), None)


def test_a_model_in_the_hub_cache_is_served_and_none_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, bool]] = []

    def snapshot(name: str, local_files_only: bool = False) -> str:
        calls.append((name, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    served = ServedPaths(model="m")
    assert served.choose("org/model", None, None) == (str(tmp_path), None, None)
    assert calls == [("org/model", True)]
    with pytest.raises(NotServedError):
        served.choose(DEFAULT, "org/adapter", None)
    assert len(calls) == 1


def test_no_default_model_is_said() -> None:
    with pytest.raises(NotServedError, match="no default model"):
        ServedPaths().choose(DEFAULT, None, None)


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="not a folder"):
        ServedPaths(root=tmp_path / "no")
