"""Checks where a command may write: never over, around or inside its inputs."""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_dora.errors import DoRAError

Inputs = Iterable[str | Path | None]
"""Files and folders that a command reads. None and Hub ids are ignored."""

_ADAPTER = {"adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"}
_MARKERS = {
    *_ADAPTER,
    "model.safetensors.index.json",
    "optimizer.safetensors",
    "fisher.json",
}
"""Any of these files marks a folder as an output of mlx_dora."""

_SUBFOLDERS = {"checkpoints", "best", "adapter", ".cache", "wandb", "swanlog"}
"""Folders that outputs contain: training, lossless fuse, Hub cache and logs."""

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.partial(\.safetensors)?")
"""A file that a killed process was writing (`mlx_dora.io.atomic`)."""

_LISTED = 5


def check_output(path: str | Path, *, inputs: Inputs, overwrite: bool = False) -> None:
    """Refuse an output folder that cannot or must not be written, before any work.

    Paths are compared after resolving links and alternative spellings.

    Args:
        path: The folder to create.
        inputs: All files and folders that are read; ``()`` if none.
        overwrite: Allow replacing `path` if it is empty or an output of mlx_dora.

    Raises:
        DoRAError: If `path` is an input, contains an input, lies inside an input, or is
            a link; if it exists and `overwrite` is false; or if overwriting it would
            delete the working or home folder or a folder not made by mlx_dora.
    """
    refuse_inputs(path, inputs)
    output = Path(path).expanduser()
    target = output.resolve()
    if output.is_symlink():
        raise DoRAError(
            f"{path} is a link to {target}; name the folder itself or another output."
        )
    if not target.exists():
        return
    if not overwrite:
        raise DoRAError(
            f"{path} already exists; choose another output or set overwrite "
            "(--overwrite on the command line)."
        )
    if not target.is_dir():
        raise DoRAError(f"{path} is a file, not a folder; choose another output.")
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(target):
            raise DoRAError(f"{path} holds {kept}; refusing to overwrite it.")
    _refuse_foreign(path, target)


def check_room(path: str | Path, nbytes: int) -> None:
    """Refuse an output that is too large for its disk, before any work.

    Args:
        path: The folder to create.
        nbytes: At least how many bytes it will have.

    Raises:
        OSError: If fewer bytes are free; the error names `path`.
    """
    target = Path(path).expanduser().resolve()
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        why = f"{nbytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {why}", str(path))


def refuse_inputs(path: str | Path, inputs: Inputs) -> None:
    """Refuse an output that is an input, contains an input, or lies inside an input.

    An input folder may contain the output if it also contains the working folder:
    users who work inside a data folder may create a new folder there.

    Raises:
        DoRAError: If `path` conflicts with an input, or cannot be an output at all.
    """
    target = Path(path).expanduser().resolve()
    if not str(path) or not target.name:
        raise DoRAError(f"{str(path)!r} cannot be an output.")
    own = _identities(target)
    working = _identities(Path.cwd())
    for source, theirs in _existing(inputs):
        if target.exists() and own[0] == theirs[0]:
            raise DoRAError(f"{path} is the input {source}; choose another output.")
        if target.exists() and own[0] in theirs:
            raise DoRAError(f"{path} holds the input {source}; choose another output.")
        if theirs[0] in own and theirs[0] not in working:
            raise DoRAError(
                f"{path} is inside the input {source}; choose another output."
            )


def check_output_file(
    path: str | Path, *, inputs: Inputs, overwrite: bool = False
) -> None:
    """Refuse an output file that cannot or must not be written, before any work.

    A new file may be written inside an input folder; of the existing files there, only
    HTML reports may be replaced.

    Args:
        path: The file to write.
        inputs: All files and folders that are read, and the command's other outputs.
        overwrite: Allow replacing `path`.

    Raises:
        DoRAError: If `path` is a folder, an input, or a file inside an input; or if it
            exists and `overwrite` is false.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise DoRAError(f"{path} is a folder, not a file; name a file to write.")
    if not target.parent.is_dir():
        raise DoRAError(f"{path}: there is no folder {target.parent} to write it to.")
    own, inputs = _identities(target), [s for s in inputs if s is not None]
    for source in inputs:
        if Path(source).expanduser().resolve() == target:
            raise DoRAError(f"{path} is {source}, used already; choose another output.")
    for source, theirs in _existing(inputs) if target.exists() else ():
        if own[0] == theirs[0]:
            raise DoRAError(f"{path} is the input {source}; choose another output.")
        if theirs[0] in own and target.suffix != ".html":
            raise DoRAError(
                f"{path} is a file of the input {source}; choose another output."
            )
    if target.exists() and not overwrite:
        raise DoRAError(f"{path} exists; add --overwrite to replace it.")


def _existing(inputs: Inputs) -> Iterator[tuple[str | Path, list[tuple[int, int]]]]:
    """Yield each input that exists, with its identities."""
    for source in inputs:
        if source is not None and (place := Path(source).expanduser()).exists():
            yield source, _identities(place)


def _identities(path: Path) -> list[tuple[int, int]]:
    """Return device and inode of a path and its parents, where they exist."""
    identities = []
    resolved = path.resolve()
    for place in (resolved, *resolved.parents):
        try:
            state = place.stat()
        except OSError:
            continue
        identities.append((state.st_dev, state.st_ino))
    return identities


def _refuse_foreign(path: str | Path, target: Path) -> None:
    """Refuse to delete a folder that mlx_dora did not make."""
    entries = sorted(p for p in target.iterdir() if not _LEFTOVER.fullmatch(p.name))
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
