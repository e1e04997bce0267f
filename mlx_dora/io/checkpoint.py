"""Reads a model folder's tensors one at a time across its shards, and writes them."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.aside import aside_of
from mlx_dora.io.atomic import flush, write_text
from mlx_dora.io.foreign import foreign
from mlx_dora.io.gate import check_dtypes, read_tensor
from mlx_dora.io.header import TensorInfo, read_header
from mlx_dora.io.stored import StoredTensor
from mlx_dora.io.stream import TensorStream, nbytes_of
from mlx_dora.io.weight_files import INDEX_NAME, weight_files, weight_map

MAX_SHARD_BYTES = 5 << 30

logger = logging.getLogger(__name__)


class Checkpoint:
    """The tensors of a model folder, indexed from checked headers and read lazily.

    The shards are the files in ``model.safetensors.index.json`` or, without an index,
    every ``model*.safetensors`` (`mlx_dora.io.weight_files`).

    Args:
        folder: A local model folder.
        all_weights: Treat every tensor as a weight, whatever its name.

    Raises:
        DoRAError: If the folder or its weights are missing, a shard is missing or
            damaged, a shard's name leads out of the folder, a tensor is listed twice or
            missing, or its dtype is refused (`mlx_dora.io.gate`).
    """

    def __init__(self, folder: str | Path, *, all_weights: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DoRAError(f"{folder} is not a model folder.")
        self._infos: dict[str, TensorInfo] = {}
        self._shards: dict[str, Path] = {}
        # Arrays not returned yet. A returned array is dropped so that it can be freed.
        self._unread: dict[Path, dict[str, mx.array]] = {}
        index = self.folder / INDEX_NAME
        files = weight_files(self.folder)
        if index.exists() and not _is_stale(index, files):
            self._read_index(index)
        else:
            self._read_shards()
        check_dtypes(folder, self._infos, all_weights=all_weights)
        # MLX cannot read a shard that holds any float64.
        self._by_numpy = {
            self._shards[name]
            for name, info in self._infos.items()
            if info.dtype == "F64"
        }

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return a tensor's dtype, shape and byte range from its shard's header."""
        if name not in self._infos:
            raise DoRAError(f"{self.folder} has no tensor {name!r}.")
        return self._infos[name]

    def shard(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        self.info(name)
        return self._shards[name]

    def tensor(self, name: str) -> mx.array:
        """Return a lazy array, whose bytes are read when it is evaluated."""
        path = self.shard(name)
        if path in self._by_numpy:
            return read_tensor(path, name, self._infos[name])
        unread = self._unread.get(path, {})
        if name not in unread:
            with foreign(path):
                loaded = mx.load(str(path))
            assert isinstance(loaded, dict)
            self._unread[path] = unread = loaded
        return unread.pop(name)

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor that is read slice by slice."""
        return StoredTensor(self.shard(name), self.info(name))

    def _read_index(self, index: Path) -> None:
        listing = weight_map(index)
        for shard in dict.fromkeys(listing.values()):
            path = self.folder / shard
            # Names must not leave the folder. Symbolic links are allowed: the Hub's
            # cache consists of them.
            if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
                raise DoRAError(f"{index}: the shard {shard!r} is not a plain name.")
            if not path.is_file():
                raise DoRAError(f"{index}: the shard {shard!r} is not in the folder.")
            header = read_header(path)
            listed = {name for name, file in listing.items() if file == shard}
            if missing := sorted(listed - header.keys()):
                raise DoRAError(f"{path} lacks {', '.join(missing)} of the index.")
            if extra := sorted(header.keys() - listed):
                logger.warning(
                    "%s: not read: %s, which the index does not list.",
                    path,
                    ", ".join(extra),
                )
            for name in listed:
                self._infos[name], self._shards[name] = header[name], path

    def _read_shards(self) -> None:
        shards = sorted(self.folder.glob("model*.safetensors"))
        if not shards:
            raise DoRAError(f"{self.folder} holds no model*.safetensors.")
        for path in shards:
            for name, info in read_header(path).items():
                if name in self._infos:
                    other = self._shards[name].name
                    raise DoRAError(f"{name!r} is in {path} and in {other}.")
                self._infos[name], self._shards[name] = info, path


def _is_stale(index: Path, files: list[Path]) -> bool:
    """Whether an index is out of date: all its files are missing, but others exist."""
    listed = set(weight_map(index).values())
    climbs = any(Path(shard).name != shard for shard in listed)  # refused by name
    if climbs or not files or any(path.name in listed for path in files):
        return False
    logger.warning("%s is ignored: it lists no file of this folder.", index)
    return True


class ShardWriter:
    """Writes tensors into a folder as mlx-lm's shards, with few blocks in memory.

    Use it as a context manager inside `atomic_directory`. The final file names and the
    index are written only if the block succeeds. A single shard is named
    ``model.safetensors``; several are named ``model-00001-of-0000n.safetensors``.

    Args:
        folder: An existing folder.
        max_shard_bytes: Largest size of a shard. A new shard starts when a tensor would
            exceed it or the header's reserved space; a larger tensor gets its own.
        resume: Continue with the shards that an earlier writer left in the folder, and
            keep them on failure (`mlx_dora.io.resumable`).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        resume: bool = False,
    ) -> None:
        self._folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._stream: TensorStream | None = None
        self._parts: list[Path] = []
        self._part_of: dict[str, int] = {}
        self._total_bytes = 0
        self._is_usable = True
        self._resume = resume
        if resume:
            self._take_over()

    @property
    def written(self) -> frozenset[str]:
        """Names of the tensors in finished shards."""
        return frozenset(self._part_of)

    def _take_over(self) -> None:
        while (path := self._part_path()).exists():
            header = read_header(path)
            self._part_of.update(dict.fromkeys(header, len(self._parts)))
            self._total_bytes += sum(info.nbytes for info in header.values())
            self._parts.append(path)

    def _part_path(self) -> Path:
        return self._folder / f"model-{len(self._parts) + 1:05d}.part.safetensors"

    def add(self, name: str, tensor: mx.array) -> None:
        """Compute and write a tensor; close a full shard first."""
        self.add_blocks(name, tensor.dtype, tensor.shape, [tensor])

    def add_blocks(
        self,
        name: str,
        dtype: mx.Dtype,
        shape: tuple[int, ...],
        blocks: Iterable[mx.array],
    ) -> None:
        """Write a tensor from consecutive blocks of its elements.

        Args:
            name: Name of the tensor.
            dtype: Dtype of the tensor and of each block.
            shape: Shape of the whole tensor.
            blocks: Arrays that hold the tensor's elements in order.

        Raises:
            DoRAError: If a tensor with this name was written already.
            OSError: If the disk is full.
        """
        if not self._is_usable:
            raise RuntimeError("this ShardWriter has failed or is closed")
        begun = self._stream.names if self._stream is not None else set()
        if name in self._part_of or name in begun:
            raise DoRAError(f"two tensors are named {name!r}.")
        try:
            stream = self._stream_for(name, dtype, shape)
            stream.begin(name, dtype, shape)
            for block in blocks:
                stream.write(block)
        except BaseException:
            self._discard()
            raise

    def _stream_for(
        self, name: str, dtype: mx.Dtype, shape: tuple[int, ...]
    ) -> TensorStream:
        """Return the open shard, or a new one if the tensor does not fit into it."""
        stream = self._stream
        if stream is not None:
            full = stream.nbytes + nbytes_of(dtype, shape) > self._max_shard_bytes
            if not full and stream.has_room(name, dtype, shape):
                return stream
            self._close_part(stream)
        self._stream = TensorStream(aside_of(self._part_path(), ".partial"))
        return self._stream

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
        elif not self._is_usable:
            raise RuntimeError("an earlier failure was suppressed; nothing is written")
        else:
            try:
                self._finalize()
            except BaseException:
                self._discard()
                raise

    def _close_part(self, stream: TensorStream) -> None:
        stream.close()
        header, path = read_header(stream.path), self._part_path()
        stream.path.replace(path)
        self._stream = None
        flush(self._folder)
        self._part_of.update(dict.fromkeys(header, len(self._parts)))
        self._total_bytes += stream.nbytes
        self._parts.append(path)

    def _finalize(self) -> None:
        if self._stream is not None:
            self._close_part(self._stream)
        if not self._parts:
            raise DoRAError(f"no tensors were given for {self._folder}.")
        count = len(self._parts)
        names = [
            f"model-{part + 1:05d}-of-{count:05d}.safetensors" for part in range(count)
        ]
        if count == 1:
            names = ["model.safetensors"]
        for part, name in zip(self._parts, names, strict=True):
            part.replace(self._folder / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {
                key: names[self._part_of[key]] for key in sorted(self._part_of)
            },
        }
        write_text(self._folder / INDEX_NAME, json.dumps(index, indent=4))
        self._is_usable = False

    def _discard(self) -> None:
        self._is_usable = False
        if self._stream is not None:
            self._stream.abandon()
            self._stream = None
        for part in () if self._resume else self._parts:
            part.unlink(missing_ok=True)
