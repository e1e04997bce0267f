"""Names of models: Hub ids, and local folders by a path that lasts."""

from pathlib import Path

import pytest

from mlx_dora.io.hub_id import hub_id, lasting_name


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    folder = cache / "models--org--lm" / "snapshots" / "1a2b"
    folder.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return folder


def test_a_hub_id_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lasting_name("org/lm") == "org/lm"
    (tmp_path / "org" / "lm").mkdir(parents=True)
    assert lasting_name("org/lm") == str(tmp_path / "org" / "lm")
    assert hub_id("org/lm") is None


@pytest.mark.parametrize(
    "text", ["", "a\0b", "a" * 5000, "~no-such-user/x", "a\udcffb"]
)
def test_what_is_no_path_stays(text: str) -> None:
    assert lasting_name(text) == text
    assert hub_id(text) is None


@pytest.mark.parametrize("name", ["models/lm", "./models/lm", "~/models/lm"])
def test_a_local_folder_lasts_as_an_absolute_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "lm").mkdir(parents=True)
    assert lasting_name(name) == str(tmp_path / "models" / "lm")
    (tmp_path / "link").symlink_to(tmp_path / "models" / "lm")
    assert lasting_name("link") == str(tmp_path / "link")  # the name that users know


def test_only_the_newest_snapshot_lasts_as_its_hub_id(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub_id(str(snapshot)) == "org/lm"
    assert lasting_name(str(snapshot)) == str(snapshot)  # the revision is unknown
    main = snapshot.parent.parent / "refs" / "main"
    main.parent.mkdir()
    main.write_text("1a2b\n")
    assert lasting_name(str(snapshot)) == "org/lm"
    main.write_text("3c4d")
    assert lasting_name(str(snapshot)) == str(snapshot)
    main.write_text("1a2b")
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", elsewhere)
    assert lasting_name(str(snapshot)) == str(snapshot)
