import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io import atomic
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as work:
        (work / "sub").mkdir()
        (work / "sub" / "f").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "f").read_text() == "x"
    assert names(target.parent) == ["out"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "o") as work:
        (work / "f").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    with (
        pytest.raises(DoRAError, match="already exists"),
        atomic_directory(tmp_path / "o"),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["o"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(DoRAError, match="already exists"),
        atomic_directory(tmp_path / "o"),
    ):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "theirs").touch()
    assert names(tmp_path / "o") == ["theirs"]
    assert names(tmp_path) == ["o"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "old").touch()
    with atomic_directory(tmp_path / "o", overwrite=True) as work:
        (work / "new").touch()
        assert names(tmp_path / "o") == ["old"]
    assert names(tmp_path / "o") == ["new"]
    assert names(tmp_path) == ["o"]


def test_failed_overwrite_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "old").touch()
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with (
        pytest.raises(OSError, match="disk gone"),
        atomic_directory(tmp_path / "o", overwrite=True) as work,
    ):
        (work / "new").touch()
    assert names(tmp_path / "o") == ["old"]
    assert names(tmp_path) == ["o"]


def test_overwrite_never_deletes_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "o" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with (
        pytest.raises(DoRAError, match="refusing"),
        atomic_directory(tmp_path / "o", overwrite=True),
    ):
        pytest.fail("the block must not run")


def test_link_is_followed_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link", overwrite=True) as work:
        (work / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_text_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["f.json"]


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        write_text(tmp_path / "f", "x")
        write_tensors(tmp_path / "t.safetensors", {"a": mx.ones(2)})
        with atomic_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(previous)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o755


def test_lazy_arrays_of_the_replaced_file_stay_valid(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": mx.full((1000,), 1.0)})
    lazy = mx.load(str(path))
    assert isinstance(lazy, dict)
    write_tensors(path, {"a": lazy["a"] + 1})
    old = mx.load(str(path))
    assert isinstance(old, dict)
    write_tensors(path, {"a": mx.full((1000,), 5.0)})
    assert old["a"].sum().item() == 2000
    assert names(tmp_path) == ["t.safetensors"]


def test_torn_tensor_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": mx.ones(4)})
    before = path.read_bytes()
    save = mx.save_safetensors

    def torn(file: str, *rest: Any) -> None:
        save(file, *rest)
        Path(file).write_bytes(Path(file).read_bytes()[:-3])

    monkeypatch.setattr(atomic.mx, "save_safetensors", torn)
    with pytest.raises(DoRAError, match="cut off"):
        write_tensors(path, {"a": mx.zeros(4)})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["t.safetensors"]
