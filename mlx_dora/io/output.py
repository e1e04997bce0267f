"""Where a command may write: never over, round or into what it was given."""

from collections.abc import Iterable
from pathlib import Path

from mlx_dora.errors import DoRAError

Inputs = Iterable[str | Path | None]
"""Files and folders that a command reads. None and Hub ids are passed over."""

_ADAPTER = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"}
_MARKERS = {
    *_ADAPTER,
    "model.safetensors.index.json",
    "optimizer.safetensors",
    "fisher.json",
}
"""Any of these files marks a folder as an output of ours."""

_SUBFOLDERS = {"checkpoints", "best", "adapter", ".cache", "wandb", "swanlog"}
"""Folders inside outputs: training's, the rest of a lossless fuse, the Hub's, logs."""

_LISTED = 5


def check_output(path: str | Path, *, inputs: Inputs, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot or must not be written, before any work.

    Paths are compared by what they lead to, through links and whatever their spelling.

    Args:
        path: The folder to make.
        inputs: All that is read to make it, ``()`` if nothing is.
        overwrite: Allow replacing `path`, if it is empty or an output of mlx_dora.

    Raises:
        DoRAError: If `path` is an input, holds one, lies inside one, or is a link; if
            it exists and `overwrite` is false; or if overwriting it would delete the
            working or home folder or a folder that mlx_dora did not make.
    """
    refuse_inputs(path, inputs)
    given = Path(path).expanduser()
    target = given.resolve()
    if given.is_symlink():
        raise DoRAError(
            f"{path} is a link to {target}; name the folder itself or another output."
        )
    if not target.exists():
        return
    if not overwrite:
        raise DoRAError(
            f"{path} already exists; choose another output or say overwrite "
            "(--overwrite on the command line)."
        )
    if not target.is_dir():
        raise DoRAError(f"{path} is a file, not a folder; choose another output.")
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(target):
            raise DoRAError(f"{path} holds {kept}; refusing to overwrite it.")
    _refuse_foreign(path, target)


def refuse_inputs(path: str | Path, inputs: Inputs) -> None:
    """Refuse an output that is an input, holds one, or lies inside an input folder.

    An input folder may hold the output if it also holds the working folder: whoever
    works inside a folder of data and names a new folder there means it.

    Raises:
        DoRAError: Naming the input; or if `path` cannot be an output at all.
    """
    target = Path(path).expanduser().resolve()
    if not str(path) or not target.name:
        raise DoRAError(f"{str(path)!r} cannot be an output.")
    own = _identities(target)
    working = _identities(Path.cwd())
    for one in inputs:
        if one is None:
            continue
        theirs = _identities(Path(one).expanduser())
        if not theirs or not Path(one).expanduser().exists():
            continue
        if target.exists() and own[0] == theirs[0]:
            raise DoRAError(f"{path} is the input {one}; choose another output.")
        if target.exists() and own[0] in theirs:
            raise DoRAError(f"{path} holds the input {one}; choose another output.")
        if theirs[0] in own and theirs[0] not in working:
            raise DoRAError(f"{path} is inside the input {one}; choose another output.")


def check_output_file(
    path: str | Path, *, inputs: Inputs, overwrite: bool = False
) -> None:
    """Refuse an output file that cannot or must not be written, before any work.

    A new file may stand inside an input folder; there only an HTML report is replaced.

    Args:
        path: The file to write.
        inputs: All that is read to make it, other outputs of the same command too.
        overwrite: Allow replacing `path`.

    Raises:
        DoRAError: If `path` is a folder, an input or a file of one, or if it exists
            and `overwrite` is false.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise DoRAError(f"{path} is a folder, not a file; name a file to write.")
    own = _identities(target)
    for one in inputs:
        if one is None:
            continue
        place = Path(one).expanduser()
        if place.resolve() == target:
            raise DoRAError(f"{path} is {one}, used already; choose another output.")
        theirs = _identities(place) if place.exists() else []
        if not theirs or not target.exists():
            continue
        if own[0] == theirs[0]:
            raise DoRAError(f"{path} is the input {one}; choose another output.")
        if theirs[0] in own and target.suffix != ".html":
            raise DoRAError(
                f"{path} is a file of the input {one}; choose another output."
            )
    if target.exists() and not overwrite:
        raise DoRAError(f"{path} exists; add --overwrite to replace it.")


def _identities(path: Path) -> list[tuple[int, int]]:
    """Device and inode of a path and of the folders above it, as far as they exist."""
    found = []
    resolved = path.resolve()
    for place in (resolved, *resolved.parents):
        try:
            state = place.stat()
        except OSError:
            continue
        found.append((state.st_dev, state.st_ino))
    return found


def _refuse_foreign(path: str | Path, target: Path) -> None:
    """Refuse to delete a folder that none of our commands would have made."""
    entries = sorted(target.iterdir())
    if not entries:
        return
    names = {entry.name for entry in entries}
    has_model = any(n.startswith("model") and n.endswith(".safetensors") for n in names)
    if not (names & _MARKERS or has_model):
        more = len(entries) - _LISTED
        seen = ", ".join(entry.name for entry in entries[:_LISTED])
        raise DoRAError(
            f"{path} is not an output of mlx_dora (it holds {seen}"
            f"{f' and {more} more' if more > 0 else ''}); refusing to overwrite it: "
            "choose another output, or delete it yourself."
        )
    for entry in entries:
        is_folder = entry.is_dir() and not entry.is_symlink()
        if is_folder and entry.name not in _SUBFOLDERS:
            raise DoRAError(
                f"{path} holds the folder {entry.name}, which mlx_dora does not make; "
                "refusing to overwrite it: choose another output, or delete it "
                "yourself."
            )
