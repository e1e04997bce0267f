"""Where outputs may be written, and which files they may replace."""

import errno
import shutil
from pathlib import Path

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io.output import check_output, check_output_file, check_room


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Return an input that looks like an output, so that only its role protects it."""
    folder = tmp_path / "all" / "given"
    folder.mkdir(parents=True)
    (folder / "adapters.safetensors").write_text("precious")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_refused_as_output_under_any_name(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    (tmp_path / "link").symlink_to(given)
    (tmp_path / "above").symlink_to(given.parent)
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("all/given", "is the input"),
        ("all/../all/given/", "is the input"),
        ("above/given", "is the input"),
        ("link", "is the input"),
        ("all", "holds the input"),
        ("above", "holds the input"),
        ("all/given/new", "is inside the input"),
        ("link/deep/new", "is inside the input"),
    ):
        with pytest.raises(DoRAError, match=message):
            check_output(name, inputs=(str(given),), overwrite=overwrite)
        with pytest.raises(DoRAError, match=message):
            check_output(tmp_path / name, inputs=("above/given",), overwrite=overwrite)
    with pytest.raises(DoRAError, match="holds the input"):
        check_output("all", inputs=(given / "adapters.safetensors",), overwrite=True)


def test_a_new_folder_beside_or_above_the_inputs_is_accepted(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(given.parent / "new", inputs=(given, None, "org/model"))
    check_output(tmp_path / "new", inputs=(given,))
    monkeypatch.chdir(given)  # working inside the data's folder
    check_output("adapters", inputs=(".",))


def test_links_and_files_are_not_replaced(given: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(given)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "file").touch()
    for name in ("link", "nowhere"):
        with pytest.raises(DoRAError, match="is a link to"):
            check_output(tmp_path / name, inputs=(), overwrite=True)
    with pytest.raises(DoRAError, match="is a file"):
        check_output(tmp_path / "file", inputs=(), overwrite=True)


@pytest.mark.parametrize("content", ["a.txt", "train.jsonl", "config.json", ".git/"])
def test_a_folder_not_made_by_mlx_dora_is_not_replaced(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "o").mkdir()
    check_output(tmp_path / "o", inputs=(), overwrite=True)  # empty
    path = tmp_path / "o" / content
    if content.endswith("/"):
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(DoRAError, match=f"not an output.*{content.strip('/')}"):
        check_output(tmp_path / "o", inputs=(), overwrite=True)


def test_what_a_killed_writer_left_does_not_prevent_overwriting(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / ".adapters.safetensors.0123456789ab.partial.safetensors").touch()
    check_output(tmp_path / "o", inputs=(), overwrite=True)
    (tmp_path / "o" / "notes.partial").touch()
    with pytest.raises(DoRAError, match=r"not an output.*holds notes\.partial\)"):
        check_output(tmp_path / "o", inputs=(), overwrite=True)


@pytest.mark.parametrize(
    "marker",
    [
        "adapters.safetensors",
        "adapter_model.safetensors",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "fisher.json",
    ],
)
def test_outputs_of_mlx_dora_are_replaced(tmp_path: Path, marker: str) -> None:
    (tmp_path / "o").mkdir()
    for name in (marker, "README.md", "config.json"):
        (tmp_path / "o" / name).touch()
    (tmp_path / "o" / "checkpoints").mkdir()
    check_output(tmp_path / "o", inputs=(), overwrite=True)
    (tmp_path / "o" / "my work").mkdir()
    with pytest.raises(DoRAError, match="holds the folder my work"):
        check_output(tmp_path / "o", inputs=(), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_root_home_and_working_folder_are_refused_as_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    home = tmp_path / "home" / "me"
    work = tmp_path / "work"
    home.mkdir(parents=True)
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for path in ("/", "", "~", ".", "..", str(home), str(home.parent)):
        with pytest.raises(DoRAError):
            check_output(path, inputs=(), overwrite=overwrite)


def test_an_output_file_does_not_replace_an_input(given: Path, tmp_path: Path) -> None:
    report, tensors = tmp_path / "report.html", given / "adapters.safetensors"
    check_output_file(report, inputs=(given,))
    check_output_file(given / "report.html", inputs=(given,))
    report.touch()
    (given / "report.html").touch()
    check_output_file(given / "report.html", inputs=(given,), overwrite=True)
    with pytest.raises(DoRAError, match="exists; add --overwrite"):
        check_output_file(report, inputs=(given,))
    for path, inputs, message in (
        (given, (given,), "is a folder"),
        (tensors, (given,), "is a file of the input"),
        (tensors, (tensors,), "used already"),
        (tmp_path / "new", (tmp_path / "new",), "used already"),
    ):
        with pytest.raises(DoRAError, match=message):
            check_output_file(path, inputs=inputs, overwrite=True)


def test_a_disk_without_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_room(tmp_path / "a" / "new", 1000)
    usage = type(shutil.disk_usage(tmp_path))(100, 90, 10_000_000)
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda p: asked.append(Path(p)) or usage)
    check_room(tmp_path / "new", 10_000_000)
    with pytest.raises(OSError, match="12 MB are needed, 10 MB are free") as caught:
        check_room(tmp_path / "a" / "new", 12_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a" / "new")
    assert asked == [tmp_path, tmp_path]  # the nearest folder that exists
