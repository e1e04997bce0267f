"""Makes the adapter that a merge results in: its config, base and history."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_dora.adapters.adapter import Adapter, BaseModel, rank_of
from mlx_dora.adapters.config import DoRAConfig


def merged_adapter(
    adapters: Sequence[Adapter],
    tensors: dict[str, mx.array],
    paths: Sequence[str],
    method: str,
    scale: float,
    names: Sequence[str],
) -> Adapter:
    """Make an adapter of merged tensors.

    Args:
        adapters: The inputs.
        tensors: The merged tensors by name.
        paths: The adapted modules.
        method: Name of the merge method.
        scale: Multiplier of every update.
        names: Folders of the inputs; empty for adapters in memory.
    """
    ranks = {path: rank_of("lora_a", tensors[f"{path}.lora_a"]) for path in paths}
    depths = [adapter.config.num_layers for adapter in adapters]
    bases = {adapter.base for adapter in adapters}
    config = DoRAConfig(
        rank=max(ranks.values()),
        scale=scale,
        keys=tuple(ranks),
        num_layers=-1 if -1 in depths else max(depths),
        rank_pattern=ranks if len(set(ranks.values())) > 1 else None,
    )
    return Adapter(
        config=config,
        tensors=tensors,
        base=bases.pop() if len(bases) == 1 else _common_base(bases),
        training={"merged": {"method": method, "adapters": list(names)}},
    )


def _common_base(bases: set[BaseModel]) -> BaseModel:
    fingerprints = {base.fingerprint for base in bases} - {None}
    models = {base.model for base in bases} - {None}
    return BaseModel(
        model=models.pop() if len(models) == 1 else None,
        fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
    )
