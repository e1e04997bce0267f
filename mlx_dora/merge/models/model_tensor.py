"""Merges one tensor of several models: opens, merges, checks, packs and writes it."""

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
        writer: Writer of the output; the tensor is packed as in the pattern.
        name: Name of the tensor.
        plan: Settings of the merge.
        pattern: The model whose dtype and packing the output has.
        base: The model that changes are relative to.
        inputs: The models to merge.
        blocks: Number of blocks of the model, for gradients.
        known: Fisher information of each input, for method ``fisher``.

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
    check = _Check(name, opened)
    check.inputs(merged.unseen)
    packing, shape = pattern.packing(name), tensors[0].shape
    if packing is None:
        packing_error = None
        wanted = kept if plan.dtype is None else getattr(mx, plan.dtype)
        writer.add_blocks(name, wanted, shape, check.blocks(merged.blocks, wanted))
    else:
        whole = joined(check.blocks(merged.blocks, mx.float32), shape)
        # Cast first: packing a float32 array would make float32 scales.
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
    """Merge a tensor, by Fisher information if it is given."""
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
    """Read a tensor that is not merged: a buffer, or integers that all models share."""
    own = pattern.read(name)
    if is_buffer(name):
        return own
    if not all(
        mx.array_equal(model.read(name), own) for model in inputs if model != pattern
    ):
        raise DoRAError(f"{name} holds integers that differ between the models.")
    return own


def _padded(opened: Mapping[Path, Tensor]) -> dict[Path, Tensor]:
    """Fill missing rows of embeddings from the first model with the most rows."""
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
class _Check:
    """Checks for NaN and inf, and reports their source."""

    name: str
    opened: Mapping[Path, Tensor]

    def inputs(self, tensors: Sequence[Tensor]) -> None:
        """Refuse those of the inputs that hold NaN or inf."""
        for folder, tensor in self.opened.items():
            if any(tensor is other for other in tensors) and not _all_finite(tensor):
                raise DoRAError(f"{folder}: {self.name} holds NaN or inf.")

    def blocks(self, blocks: Iterable[mx.array], dtype: mx.Dtype) -> Iterator[mx.array]:
        """Check and cast blocks; yield each while the next is being computed."""
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
        # A float32 value may overflow float16; bfloat16 has the range of float32.
        if is_finite(cast if cast.dtype == mx.float16 else block):
            return cast
        self.inputs(list(self.opened.values()))
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
    """Pack and write a tensor; return the relative error of packing."""
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
    # Write the weight last: a resumed merge treats it as proof that all parts exist.
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
