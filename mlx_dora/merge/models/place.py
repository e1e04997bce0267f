"""Places of the output's tensors in the input models: whole models, or their blocks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_dora.adapters.keys import natural_order
from mlx_dora.io.derived import is_before_blocks
from mlx_dora.merge.models.settings import block_of, depth_of, with_block


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an output tensor comes from.

    Attributes:
        name: Name in the output.
        sources: Name in each input.
        base: Name in the base.
        depth: Position of its block between the first (0) and the last (1) block of
            the whole model or the slice; 0 outside the blocks.
    """

    name: str
    sources: tuple[str, ...]
    base: str
    depth: float = 0.0


def whole_places(names: Iterable[str], count: int, blocks: int) -> list[Place]:
    """Places in a merge of `count` whole models with some blocks, in natural order."""
    return [
        Place(
            name=name, sources=(name,) * count, base=name, depth=depth_of(name, blocks)
        )
        for name in sorted(names, key=natural_order)
    ]


def slice_places(
    names: Iterable[str],
    starts: Sequence[int],
    base_start: int,
    pattern_start: int,
    count: int,
    first: int,
    *,
    is_first: bool,
    is_last: bool,
) -> list[Place]:
    """Places in a slice of the output.

    The input embeddings come from the first slice, and what else is outside the blocks
    from the last, as in mergekit.

    Args:
        names: Names of the tensors of the slice's pattern.
        starts: First block of each input.
        base_start: First block of the base.
        pattern_start: First block of the pattern.
        count: Number of blocks.
        first: First block in the output.
        is_first: Whether this is the first slice.
        is_last: Whether this is the last slice.
    """
    places = []
    for name in names:
        block = block_of(name)
        if block is None:
            is_input = is_before_blocks(name)
            if is_first if is_input else is_last:
                sources = (name,) * len(starts)
                places.append(Place(name=name, sources=sources, base=name))
            continue
        i = block - pattern_start
        if 0 <= i < count:
            places.append(
                Place(
                    name=with_block(name, first + i),
                    sources=tuple(with_block(name, start + i) for start in starts),
                    base=with_block(name, base_start + i),
                    depth=i / (count - 1) if count > 1 else 1.0,
                )
            )
    return places
