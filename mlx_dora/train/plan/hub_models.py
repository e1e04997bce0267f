"""Which of 20 well-known models of the Hub would fit, from their configs alone.

``hub_models.json`` holds the sizes that the models' own ``config.json`` files state;
`tests` compares the resulting numbers of parameters with the published ones.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.counts import RowSizes
from mlx_dora.io.json import read_object
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.plan.attention import this_device
from mlx_dora.train.plan.rows import largest_batches
from mlx_dora.train.plan.shapes import ModelShapes, build_empty, shapes_of
from mlx_dora.train.plan.step import MemoryPlan, plan_step

_CONFIGS = Path(__file__).with_name("hub_models.json")
_GROUP = 64  # weights that share a scale and a bias of 16 bits each
_BYTES_AT_4_BITS = 4 / 8 + 2 * 2 / _GROUP


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """The predicted peak memory of training a model of the Hub.

    Args:
        name: Hub id.
        parameters: Number of parameters.
        peak_16bit: Bytes at the peak, with weights of 16 bits.
        peak_4bit: Bytes at the peak, quantized to 4 bits in groups of 64.
        fits: ``"16-bit"`` or ``"4-bit"``, the most precise weights that fit;
            ``"4-bit, --grad-checkpoint"``; or None.
    """

    name: str
    parameters: int
    peak_16bit: int
    peak_4bit: int
    fits: str | None


def fitting_models(
    train: TrainConfig,
    dora: DoRAConfig,
    sizes: RowSizes,
    limit: int,
    rows_per_unit: int = 1,
) -> list[HubModel]:
    """Predict for 20 models of the Hub whether a training fits.

    Args:
        train: Settings of the training; its model does not matter.
        dora: Settings of the adapter.
        sizes: Sizes of the rows, as some tokenizer counts them.
        limit: Bytes to fit into.
        rows_per_unit: Rows of a batch for each of `sizes`: 2 for pairs.
    """
    steps = largest_batches(train, sizes, rows_per_unit)
    device = this_device()

    def largest(shapes: ModelShapes, **changes: Any) -> MemoryPlan:
        plans = (
            plan_step(
                replace(shapes, target_share=share),
                replace(step, **changes),
                limit,
                device,
            )
            for step, share in steps
        )
        return max(plans, key=lambda plan: plan.peak)

    models = []
    for name, config in read_object(_CONFIGS).items():
        empty = build_empty(config, name)
        arrays = [value.shape for _, value in tree_flatten(empty.parameters())]  # pyright: ignore[reportAttributeAccessIssue] - arrays
        layers = min(dora.num_layers, config["num_hidden_layers"])
        settings = replace(dora, num_layers=layers)
        dense = shapes_of(empty, config, settings, train.fine_tune_type)
        dense = replace(dense, rows_per_unit=rows_per_unit)
        packed = replace(dense, weight_bytes=int(sum(map(_packed_bytes, arrays))))
        at_16, at_4 = largest(dense), largest(packed)
        ways = {
            "16-bit": at_16,
            "4-bit": at_4,
            "4-bit, --grad-checkpoint": largest(packed, grad_checkpoint=True),
        }
        models.append(
            HubModel(
                name=name,
                parameters=sum(map(prod, arrays)),
                peak_16bit=at_16.peak,
                peak_4bit=at_4.peak,
                fits=next((way for way, plan in ways.items() if plan.fits), None),
            )
        )
    return models


def _packed_bytes(shape: tuple[int, ...]) -> float:
    is_packed = len(shape) > 1 and shape[-1] % _GROUP == 0
    return prod(shape) * (_BYTES_AT_4_BITS if is_packed else 2)
