"""Merges one tensor of several models: opens, merges, checks, packs and writes it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_dora.errors import DoRAError
from mlx_dora.io.checkpoint import ShardWriter
from mlx_dora.io.derived import is_buffer
from mlx_dora.io.finite import all_finite, is_finite
from mlx_dora.matrix.weight import dense, weight_from
from mlx_dora.merge.fisher.information import Fisher
from mlx_dora.merge.methods.blockwise import Tensor, held, joined, slices
from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.model_tensors import ModelTensors, Packing
from mlx_dora.merge.models.place import Place
from mlx_dora.merge.models.plan import MergePlan
from mlx_dora.merge.models.report import MergedTensor
from mlx_dora.merge.models.tensor import Merged, merge_blocks, merge_informed_tensor
from mlx_dora.merge.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class Job:
    """A merge of opened models, or of slices of their blocks.

    Attributes:
        plan: Settings of the merge.
        pattern: The model whose names, dtypes and packing the output has.
        base: The model that changes are relative to.
        inputs: The models to merge.
        fishers: Fisher information of each input; empty if not used.
        dtype: Dtype of the output; None keeps the pattern's.
        vocabulary: The output's vocabulary; None if all models have the same.
    """

    plan: MergePlan
    pattern: ModelTensors
    base: ModelTensors | None
    inputs: Sequence[ModelTensors]
    fishers: Sequence[Fisher] = ()
    dtype: str | None = None
    vocabulary: Vocabulary | None = None

    def own_name(self, place: Place) -> str:
        """The tensor's name in the pattern."""
        return place.base if self.pattern is self.base else place.sources[0]

    @property
    def start(self) -> ModelTensors | None:
        """The base, if the method uses it."""
        return self.base if self.plan.relative or self.plan.entry.needs_base else None

    def is_carried(self, place: Place) -> bool:
        """Whether a tensor is copied: a buffer, or integers."""
        own = self.own_name(place)
        return self.pattern.dtype(own) is None or is_buffer(own)

    def shape(self, place: Place) -> tuple[int, ...]:
        """Shape of the output."""
        names = zip(self.inputs, place.sources, strict=True)
        shapes = [model.shape(name) for model, name in names]
        if self.start is not None:
            shapes.append(self.start.shape(place.base))
        if not shapes[0]:
            return ()
        own = self.own_name(place)
        if self.vocabulary is not None and self.pattern.holds_tokens(own):
            return (self.vocabulary.size, *shapes[0][1:])
        return (max(shape[0] for shape in shapes), *shapes[0][1:])

    def settings(self, place: Place) -> TensorSettings:
        """Settings of the method for one tensor."""
        shape, own = self.shape(place), self.own_name(place)
        rows = math.prod(shape[:-1]) if len(shape) > 1 else 1
        if (original := self.pattern.original(own)) != own:
            place = replace(
                place, name=original, sources=(original,) * len(self.inputs)
            )
        return self.plan.settings_of(place, rows)

    def opened(self, place: Place) -> dict[ModelTensors, Tensor]:
        """Open the tensor in every model, with rows of the output's vocabulary."""
        pairs = list(zip(self.inputs, place.sources, strict=True))
        if self.start is not None:
            pairs.append((self.start, place.base))
        opened = {model: model.source(name) for model, name in pairs}
        if self.vocabulary is not None:
            if self.pattern.holds_tokens(self.own_name(place)):
                return self.vocabulary.gathered(opened)
        elif self.plan.pad:
            return _padded(opened)
        return opened

    def merge(self, place: Place, writer: ShardWriter) -> MergedTensor:
        """Merge one tensor block by block into a writer.

        Raises:
            DoRAError: If an input holds NaN or inf, or the method cannot be used.
        """
        name, own = place.name, self.own_name(place)
        kept = self.pattern.dtype(own)
        if kept is None or self.is_carried(place):
            writer.add(name, self._carried(place))
            return MergedTensor(name=name, opposed=0, packing_error=None)
        opened = self.opened(place)
        tensors = [opened[model] for model in self.inputs]
        start = None if self.start is None else opened[self.start]
        shape = tensors[0].shape
        try:
            merged = self._merged(name, start, tensors, self.settings(place))
        except DoRAError as error:
            raise DoRAError(f"{name}: {error}") from error
        check = _Check(name, opened)
        check.inputs(merged.unseen)
        packing, packing_error = self.pattern.packing(own), None
        if packing is None:
            wanted = kept if self.dtype is None else getattr(mx, self.dtype)
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
        self,
        name: str,
        start: Tensor | None,
        tensors: Sequence[Tensor],
        settings: TensorSettings,
    ) -> Merged:
        """Merge a tensor, by Fisher information if it is given."""
        plan = self.plan
        if not self.fishers:
            return merge_blocks(plan.method, start, tensors, settings, plan.granularity)
        path = name.removesuffix(".weight")
        whole, unknown = merge_informed_tensor(
            [held(tensor) for tensor in tensors],
            settings,
            [fisher.read(path, self.pattern.shape(name)) for fisher in self.fishers],
        )
        return Merged(iter([whole.reshape(-1)]), unknown=unknown)

    def _carried(self, place: Place) -> mx.array:
        """Read a tensor that is not merged: a buffer, or integers that all share."""
        own = self.own_name(place)
        tensor = self.pattern.read(own)
        others = zip(self.inputs, place.sources, strict=True)
        if not is_buffer(own) and not all(
            mx.array_equal(model.read(name), tensor)
            for model, name in others
            if model is not self.pattern
        ):
            raise DoRAError(
                f"{place.name} holds integers that differ between the models, which "
                "cannot be merged."
            )
        return tensor


def _padded(opened: Mapping[ModelTensors, Tensor]) -> dict[ModelTensors, Tensor]:
    """Fill missing rows of embeddings from the first model with the most rows."""
    rows = max(tensor.shape[0] if tensor.ndim else 0 for tensor in opened.values())
    if all(tensor.ndim == 0 or tensor.shape[0] == rows for tensor in opened.values()):
        return dict(opened)
    longest = next(tensor for tensor in opened.values() if tensor.shape[0] == rows)
    filled: dict[ModelTensors, Tensor] = {}
    for model, tensor in opened.items():
        own, rest = tensor[:], longest[tensor.shape[0] :]
        filled[model] = mx.concatenate([own, rest.astype(own.dtype)])
    return filled


@dataclass(frozen=True)
class _Check:
    """Checks for NaN and inf, and reports their source."""

    name: str
    opened: Mapping[ModelTensors, Tensor]

    def inputs(self, tensors: Sequence[Tensor]) -> None:
        """Refuse those of the inputs that hold NaN or inf."""
        for model, tensor in self.opened.items():
            if any(tensor is other for other in tensors):
                flat = tensor.reshape(-1)
                if not all(is_finite(flat[index]) for index in slices(flat.size)):
                    raise DoRAError(f"{model.label}: {self.name} holds NaN or inf.")

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


def _pack(
    writer: ShardWriter, name: str, merged: mx.array, kept: mx.Dtype, packing: Packing
) -> float:
    """Pack and write a tensor; return the relative error of packing."""
    made = mx.quantize(
        merged.astype(kept), packing.group_size, packing.bits, packing.mode
    )
    leaves = ["weight", "scales", "biases"]
    parts = dict(zip(leaves, made, strict=False))
    if not all(all_finite(part) for part in made[1:]):
        raise DoRAError(
            f"{name}: the merged tensor is too large for scales in {kept}, though no "
            "model holds NaN or inf."
        )
    restored = dense(weight_from(parts, packing)).astype(mx.float32)
    difference = float(mx.square(restored - merged).sum())
    total = float(mx.square(merged).sum())
    # Write the weight last: a resumed merge treats it as proof that all parts exist.
    for leaf in reversed(parts):
        part = f"{name.removesuffix('weight')}{leaf}"
        if part not in writer.written:
            writer.add(part, parts[leaf])
    return (difference / total) ** 0.5 if total else 0.0
