"""Settings of a plan for a tensor by name, as in a merge of whole models."""

from mlx_dora.merge.methods.settings import TensorSettings
from mlx_dora.merge.models.place import whole_places
from mlx_dora.merge.models.plan import MergePlan


def settings_of(plan: MergePlan, name: str, rows: int, blocks: int) -> TensorSettings:
    (place,) = whole_places([name], len(plan.models), blocks)
    return plan.settings_of(place, rows)
