"""Reads the tensors of a model folder for a merge, which treats all as dense."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.io.derived import head_and_embedding, is_buffer, ties_embeddings
from mlx_dora.io.json import read_object
from mlx_dora.io.stored import FLOATS
from mlx_dora.matrix.weight import dense, weight_from
from mlx_dora.merge.methods.blockwise import Tensor

_DTYPES = {
    "F64": mx.float32,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
}


# Last parts of the names of tensors that GPTQ, AWQ, bitsandbytes, HQQ and
# compressed-tensors store in place of a weight, or beside it.
_OTHER_PACKINGS = (
    "qweight",
    "qzeros",
    "g_idx",
    "weight_packed",
    "W_q",
    "absmax",
    "quant_map",
    "SCB",
)


def _refuse_other_packings(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights that another tool packed.

    Raises:
        DoRAError: Naming the first of them, and their number.
    """
    packed = sorted(n for n in names if n.rpartition(".")[2] in _OTHER_PACKINGS)
    if packed:
        raise DoRAError(
            f"{folder}: {packed[0]} and {len(packed) - 1} more tensors are packed by "
            "another tool (GPTQ, AWQ, bitsandbytes or the like): convert the model to "
            "floats, or to MLX's packing, first."
        )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight is packed; the arguments of `mx.quantize`."""

    group_size: int
    bits: int
    mode: str


class ModelTensors:
    """A model folder's tensors by name, dense or packed, read one at a time.

    A packed weight with its scales and biases is one tensor here. Reading a head that
    is tied to the embedding reads the embedding, whether or not a copy is stored.

    Args:
        folder: A local model folder.

    Attributes:
        notes: What a report says about the model.

    Raises:
        DoRAError: If its files are invalid (`Checkpoint`), or a packed weight has no
            entry in its config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._checkpoint = Checkpoint(folder)
        self.config: dict[str, Any] = read_object(folder / "config.json")
        tokens = self.config.get("vocab_size", 1)
        if type(tokens) is not int or tokens < 1:
            raise DoRAError(
                f"{folder / 'config.json'}: vocab_size must be a whole number of at "
                f"least 1, got {tokens!r:.60}."
            )
        names = set(self._checkpoint.names)
        _refuse_other_packings(folder, names)
        packed = [
            path
            for name in names
            if (path := name.removesuffix(".scales")) != name
            and f"{path}.weight" in names
        ]
        self._packed = {f"{path}.weight": self._packing(path) for path in packed}
        parts = {f"{path}.{leaf}" for path in packed for leaf in ("scales", "biases")}
        self.names = sorted(names - parts)
        self._stored = frozenset(self.names)
        self._tied: dict[str, str] = {}
        self._tied = self._tied_head()

    @property
    def label(self) -> str:
        """What messages call the model."""
        return str(self.folder)

    @property
    def files(self) -> list[Path]:
        """All files that determine the tensors."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def token_rows(self) -> int:
        """Number of rows of the embedding; the config's vocabulary if it is unknown."""
        if self.embedding is not None:
            return self.shape(self.embedding)[0]
        return self.config.get("vocab_size", 1)

    @cached_property
    def embedding(self) -> str | None:
        """Name of the input embedding; None if it is not one of the known names."""
        pair = head_and_embedding(self.names)
        return None if pair is None else pair[1]

    @cached_property
    def _by_token(self) -> frozenset[str]:
        pair = head_and_embedding(self.names)
        if pair is None:
            return frozenset()
        return frozenset({*pair, f"{pair[0].removesuffix('weight')}bias"})

    def holds_tokens(self, name: str) -> bool:
        """Whether a tensor has a row for each token: embedding, head, head's bias."""
        return name in self._by_token

    @property
    def copies(self) -> frozenset[str]:
        """Stored tensors that can be derived: rotary buffers, a tied head."""
        return frozenset(n for n in self.names if is_buffer(n) or n in self._tied)

    def original(self, name: str) -> str:
        """Name of the tensor to read: the embedding for a tied head."""
        return self._tied.get(name, name)

    def has(self, name: str) -> bool:
        """Whether a tensor can be read: it is stored, or is a tied head."""
        return name in self._tied or name in self._stored

    def packing(self, name: str) -> Packing | None:
        """How a tensor is packed; None if it is dense."""
        return self._packed.get(self.original(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, unpacked."""
        name = self.original(name)
        shape = self._checkpoint.info(name).shape
        packing = self.packing(name)
        if packing is None:
            return shape
        return (*shape[:-1], shape[-1] * 32 // packing.bits)

    def dtype(self, name: str) -> mx.Dtype | None:
        """Dtype of a float tensor, unpacked; None for integers."""
        name = self.original(name)
        if self.packing(name) is not None:
            name = f"{name.removesuffix('.weight')}.scales"
        stored = self._checkpoint.info(name).dtype
        # Modes other than affine have scales of eight bits and unpack to bfloat16.
        return mx.bfloat16 if stored == "U8" else _DTYPES.get(stored)

    def read(self, name: str) -> mx.array:
        """Read a tensor, unpacked and evaluated."""
        name = self.original(name)
        tensor, packing = self._checkpoint.tensor(name), self.packing(name)
        if packing is not None:
            path = name.removesuffix("weight")
            leaves = ("scales", "biases") if packing.mode == "affine" else ("scales",)
            parts = {leaf: self._checkpoint.tensor(f"{path}{leaf}") for leaf in leaves}
            tensor = dense(weight_from({"weight": tensor, **parts}, packing))
        mx.eval(tensor)
        return tensor

    def source(self, name: str) -> Tensor:
        """Open a float tensor for reading in blocks; a packed one is unpacked whole."""
        name = self.original(name)
        is_stored = self._checkpoint.info(name).dtype in FLOATS
        return self._checkpoint.stored(name) if is_stored else self.read(name)

    def _tied_head(self) -> dict[str, str]:
        """Map the head to the embedding, if they are tied."""
        pair = head_and_embedding(self.names)
        if pair is None:
            return {}
        head, embedding = pair
        ties = ties_embeddings(self.config)
        if head in self.names and ties is None:
            alike = self.shape(head) == self.shape(embedding)
            ties = alike and bool(mx.array_equal(self.read(head), self.read(embedding)))
        return {} if head in self.names and not ties else {head: embedding}

    def _packing(self, path: str) -> Packing:
        settings = self.config.get("quantization")
        if isinstance(settings, dict):
            own = settings.get(path)
            entry = {**settings, **own} if isinstance(own, dict) else settings
            group_size, bits = entry.get("group_size"), entry.get("bits")
            if isinstance(group_size, int) and isinstance(bits, int):
                return Packing(
                    group_size=group_size, bits=bits, mode=entry.get("mode", "affine")
                )
        raise DoRAError(
            f"{self.folder}: {path} is packed, but config.json has no quantization "
            "entry with group_size and bits for it."
        )
