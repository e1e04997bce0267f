import errno
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io import atomic
from mlx_dora.io.aside import remove_leftovers
from mlx_dora.io.atomic import atomic_directory, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_output(folder: Path) -> Path:
    """A folder that looks like an output of ours."""
    folder.mkdir()
    (folder / "adapters.safetensors").touch()
    return folder


def test_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target, inputs=()) as work:
        (work / "sub").mkdir()
        (work / "sub" / "f").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "f").read_text() == "x"
    assert names(target.parent) == ["out"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "o", inputs=()) as work,
    ):
        (work / "f").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    with (
        pytest.raises(DoRAError, match="already exists"),
        atomic_directory(tmp_path / "o", inputs=()),
    ):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["o"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(DoRAError, match="already exists"),
        atomic_directory(tmp_path / "o", inputs=()),
    ):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "theirs").touch()
    assert names(tmp_path / "o") == ["theirs"]
    assert names(tmp_path) == ["o"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    old_output(tmp_path / "o")
    with atomic_directory(tmp_path / "o", inputs=(), overwrite=True) as work:
        (work / "new").touch()
        assert names(tmp_path / "o") == ["adapters.safetensors"]
    assert names(tmp_path / "o") == ["new"]
    assert names(tmp_path) == ["o"]


def test_failed_overwrite_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(tmp_path / "o")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with (
        pytest.raises(OSError, match="disk gone"),
        atomic_directory(tmp_path / "o", inputs=(), overwrite=True) as work,
    ):
        (work / "new").touch()
    assert names(tmp_path / "o") == ["adapters.safetensors"]
    assert names(tmp_path) == ["o"]


def test_overwrite_never_deletes_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "o" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with (
        pytest.raises(DoRAError, match="refusing"),
        atomic_directory(tmp_path / "o", inputs=(), overwrite=True),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("suffix", ["partial", "resume"])
def test_what_a_killed_overwrite_moved_away_returns(
    tmp_path: Path, suffix: str
) -> None:
    holder = tmp_path / f".o.0123456789ab.{suffix}"
    (holder / "new").mkdir(parents=True)
    old_output(holder / "old")
    remove_leftovers(tmp_path / "o")
    assert names(tmp_path / "o") == ["adapters.safetensors"]
    # The half-written part of a merge is what the next one goes on with.
    assert holder.exists() == (suffix == "resume")


def test_leftovers_of_a_killed_process_go_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".o.0123456789ab.partial" / "new").mkdir(parents=True)
    (tmp_path / ".p.0123456789ab.partial").mkdir()  # another output's
    (tmp_path / ".o.notes.partial").mkdir()  # not a name of ours
    with atomic_directory(tmp_path / "o", inputs=()):
        pass
    assert names(tmp_path) == [".o.notes.partial", ".p.0123456789ab.partial", "o"]


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with (
        pytest.raises(DoRAError, match="already exists"),
        atomic_directory(tmp_path / "o", inputs=()) as first,
    ):
        with atomic_directory(tmp_path / "o", inputs=()):
            assert first.exists()
        assert first.exists()
    assert names(tmp_path) == ["o"]


def test_a_planted_link_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    link = tmp_path / ".o.0123456789ab.partial"
    link.symlink_to(tmp_path / "precious")
    with atomic_directory(tmp_path / "o", inputs=()):
        pass
    assert names(tmp_path / "precious") == ["file"]


def test_a_stop_between_the_two_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_output(tmp_path / "o")
    rename = Path.rename

    def stop_after_the_first(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if target.name == "old":
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", stop_after_the_first)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "o", inputs=(), overwrite=True) as work,
    ):
        (work / "new").touch()
    assert names(tmp_path / "o") == ["adapters.safetensors"]
    assert names(tmp_path) == ["o"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source/tokenizer.json"),
        # As the tokenizers package has it.
        Exception(f"No space left on device (os error {errno.ENOSPC})"),
    ],
)
def test_a_full_disk_names_the_output(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(OSError, match="No space left") as info,
        atomic_directory(tmp_path / "o", inputs=()),
    ):
        raise error
    assert info.value.filename == str(tmp_path / "o")
    assert names(tmp_path) == []


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
        with atomic_directory(tmp_path / "d", inputs=()):
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
