"""One tensor of a merge of models: opened, merged, looked at, packed, written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import ShardWriter
from mlx_dora.io.derived import is_buffer
from mlx_dora.io.finite import all_finite, is_finite
from mlx_dora.matrix.packed import QuantizedWeight
from mlx_dora.merge.methods.blockwise import BLOCK, Tensor, held, joined
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.informed import merge_informed_tensor
from mlx_dora.merge.models.model_tensors import ModelTensors, Packing
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.report import MergedTensor
from mlx_dora.merge.models.tensor import Merged, merge_blocks


def merge_one(
    writer: ShardWriter,
    name: str,
    plan: MergePlan,
    pattern: ModelTensors,
    base: ModelTensors | None,
    inputs: Sequence[ModelTensors],
    blocks: int,
    known: Sequence[mx.array | None],
) -> MergedTensor:
    """Merge one tensor block by block into a writer.

    Args:
        writer: Takes it, packed as the pattern's.
        name: The tensor.
        plan: How to merge.
        pattern: The model whose dtype and packing the output has.
        base: What changes are relative to.
        inputs: The models.
        blocks: How many blocks the model has, for gradients.
        known: Fisher information, one an input, for that method.

    Raises:
        DoRAError: If an input holds NaN or inf, or the method cannot be used.
    """
    kept = pattern.dtype(name)
    if kept is None or is_buffer(name):
        writer.add(name, _carried(name, pattern, inputs))
        return MergedTensor(name=name, opposed=0, packing_error=None)
    if base is not None and not (plan.relative or plan.entry.needs_base):
        base = None
    opened = {model.folder: model.source(name) for model in inputs}
    if base is not None:
        opened[base.folder] = base.source(name)
    if plan.pad:
        opened = _padded(opened)
    tensors = [opened[model.folder] for model in inputs]
    start = None if base is None else opened[base.folder]
    settings = plan.settings_of(pattern.original(name), _rows_of(tensors[0]), blocks)
    try:
        merged = _merged(plan, start, tensors, settings, known)
    except DoRAError as error:
        raise DoRAError(f"{name}: {error}") from error
    look = _Look(name, opened)
    look.at(merged.unseen)
    packing, shape = pattern.packing(name), tensors[0].shape
    if packing is None:
        packing_error = None
        wanted = kept if plan.dtype is None else getattr(mx, plan.dtype)
        writer.add_blocks(name, wanted, shape, look.through(merged.blocks, wanted))
    else:
        whole = joined(look.through(merged.blocks, mx.float32), shape)
        # Packing of a float32 array would make float32 scales.
        packing_error = _pack(writer, name, whole, kept, packing)
    return MergedTensor(
        name=name,
        opposed=merged.opposed,
        packing_error=packing_error,
        unknown=merged.unknown,
    )


def _merged(
    plan: MergePlan,
    start: Tensor | None,
    tensors: Sequence[Tensor],
    settings: TensorSettings,
    known: Sequence[mx.array | None],
) -> Merged:
    """The merged tensor, by Fisher information where there is some."""
    if not known:
        return merge_blocks(plan.method, start, tensors, settings, plan.granularity)
    whole, unknown = merge_informed_tensor(
        [held(tensor) for tensor in tensors], settings, known
    )
    return Merged(iter([whole.reshape(-1)]), unknown=unknown)


def _rows_of(tensor: Tensor) -> int:
    return tensor.size // tensor.shape[-1] if tensor.ndim > 1 else 1


def _carried(
    name: str, pattern: ModelTensors, inputs: Sequence[ModelTensors]
) -> mx.array:
    """A tensor that is not merged: a buffer, or integers that all models share."""
    own = pattern.read(name)
    if is_buffer(name):
        return own
    if not all(
        mx.array_equal(model.read(name), own) for model in inputs if model != pattern
    ):
        raise DoRAError(f"{name} holds integers that differ between the models.")
    return own


def _padded(opened: Mapping[Path, Tensor]) -> dict[Path, Tensor]:
    """Embeddings of unlike vocabularies: a row that a model lacks is the first's."""
    rows = max(tensor.shape[0] if tensor.ndim else 0 for tensor in opened.values())
    if all(tensor.ndim == 0 or tensor.shape[0] == rows for tensor in opened.values()):
        return dict(opened)
    longest = next(tensor for tensor in opened.values() if tensor.shape[0] == rows)
    filled: dict[Path, Tensor] = {}
    for folder, tensor in opened.items():
        own, rest = tensor[:], longest[tensor.shape[0] :]
        filled[folder] = mx.concatenate([own, rest.astype(own.dtype)])
    return filled


@dataclass(frozen=True)
class _Look:
    """Looks for NaN and inf, and says where they come from."""

    name: str
    opened: Mapping[Path, Tensor]

    def at(self, tensors: Sequence[Tensor]) -> None:
        """Refuse inputs that hold some."""
        for folder, tensor in self.opened.items():
            if any(tensor is other for other in tensors) and not _all_finite(tensor):
                raise DoRAError(f"{folder}: {self.name} holds NaN or inf.")

    def through(
        self, blocks: Iterable[mx.array], dtype: mx.Dtype
    ) -> Iterator[mx.array]:
        """Pass on finite blocks in a dtype, each while the next is being computed."""
        waiting = None
        for block in blocks:
            cast = block.astype(dtype)
            mx.async_eval(block, cast)
            if waiting is not None:
                yield self._finite(*waiting)
            waiting = block, cast
        if waiting is not None:
            yield self._finite(*waiting)

    def _finite(self, block: mx.array, cast: mx.array) -> mx.array:
        # What float32 holds may be too large for float16; bfloat16 reaches as far.
        if is_finite(cast if cast.dtype == mx.float16 else block):
            return cast
        self.at(list(self.opened.values()))
        raise DoRAError(
            f"{self.name}: the merged tensor is too large for {cast.dtype}, though no "
            "model holds NaN or inf."
        )


def _all_finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    starts = range(0, flat.size, BLOCK)
    return all(is_finite(flat[first : first + BLOCK]) for first in starts)


def _pack(
    writer: ShardWriter, name: str, merged: mx.array, kept: mx.Dtype, packing: Packing
) -> float:
    """Write a tensor packed; the relative error that this adds."""
    packed, scales, *biases = mx.quantize(
        merged.astype(kept), packing.group_size, packing.bits, packing.mode
    )
    path = name.removesuffix(".weight")
    if not all(all_finite(part) for part in (scales, *biases)):
        raise DoRAError(
            f"{name}: the merged tensor is too large for scales in {kept}, though no "
            "model holds NaN or inf."
        )
    back = QuantizedWeight(
        weight=packed,
        scales=scales,
        biases=biases[0] if biases else None,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
    )
    error = _relative_error(back.dequantize(), merged)
    # The weight last: a resumed merge takes it for a sign that all is there.
    parts = {f"{path}.scales": scales, name: packed}
    if biases:
        parts = {f"{path}.biases": biases[0], **parts}
    for part, value in parts.items():
        if part not in writer.written:
            writer.add(part, value)
    return error


def _relative_error(restored: mx.array, exact: mx.array) -> float:
    difference = float(mx.square(restored.astype(mx.float32) - exact).sum())
    total = float(mx.square(exact).sum())
    return (difference / total) ** 0.5 if total else 0.0
