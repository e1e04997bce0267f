"""What a merge of models is to do, tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.names import FISHER, MEANS, MODEL_METHODS
from mlx_dora.merge.settings import check_setting, depth_of, resolve
from mlx_dora.merge.tensor import TensorSettings
from mlx_dora.merge.weights import Weights, check_weights, row_weights

PARAMETERS = ("density", "normalize", "lambda", "seed", "granularity", "pad")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Inputs and settings of a merge of models.

    Attributes:
        models: Folders or Hub ids, those that are merged.
        base: What changes are relative to, and the pattern for the output; None makes
            the first model the pattern.
        method: A method's name.
        granularity: ``"row"`` or ``"tensor"``.
        weights: As given to `merge_models`; None for equal ones.
        per_model: Settings of each model by name (``weight``, ``density``), which go
            before `parameters`.
        parameters: Settings of all.
        dtype: Of the output's tensors; None keeps the pattern's.
        seed: Of dare's random numbers.
        pad: Merge embeddings of unlike vocabularies.
        relative: Whether a mean merges changes of the base, where there is one.
        fisher: Folders of Fisher information, one a model, for that method.
    """

    models: tuple[str, ...]
    base: str | None = None
    method: str = "slerp"
    granularity: str = "row"
    weights: Weights | None = None
    per_model: tuple[Mapping[str, Any], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    pad: bool = False
    relative: bool = True
    fisher: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.models)
        if self.method not in MODEL_METHODS:
            raise DoRAError(
                f"no merge method {self.method!r} for models: "
                f"{', '.join(MODEL_METHODS)}."
            )
        if not count:
            raise DoRAError("give at least one model to merge.")
        if self.method == "slerp" and count != 2:
            raise DoRAError(f"slerp takes two models, got {count}.")
        if self.base is None and self.method not in ("linear", FISHER, *MEANS[:3]):
            raise DoRAError(f"{self.method} needs a base: give one.")
        if self.granularity not in ("row", "tensor"):
            raise DoRAError(
                f"granularity must be row or tensor, got {self.granularity!r}."
            )
        if self.granularity == "tensor" and self.method == "magnitude_weighted":
            raise DoRAError("magnitude_weighted weighs rows: its granularity is row.")
        if self.granularity == "tensor" and self.method == FISHER:
            raise DoRAError("fisher weighs rows or elements: its granularity is row.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DoRAError(f"dtype must be {', '.join(DTYPES)}, got {self.dtype!r}.")
        check_weights(self.weights, count)
        for settings in (self.parameters, *self.per_model):
            for name, setting in settings.items():
                check_setting(name, setting)

    def settings_of(self, name: str, rows: int, blocks: int) -> TensorSettings:
        """What to do with one tensor.

        Args:
            name: Its name.
            rows: How many rows it has.
            blocks: How many blocks the model has, for gradients.
        """
        depth = depth_of(name, blocks)
        count = len(self.models)

        def value(key: str, model: int | None = None) -> float | bool | None:
            own = self.per_model[model] if model is not None and self.per_model else {}
            for settings in (own, self.parameters):
                if key in settings:
                    found = resolve(settings[key], name, depth)
                    if found is not None:
                        return found
            return None

        if self.per_model or "t" in self.parameters:
            own = [value("weight", i) for i in range(count)]
            weights = self._named_weights(name, own, value("t"))
        else:
            module = name.removesuffix(".weight").removesuffix(".bias")
            shares = row_weights(self.weights, module, count, rows, normalize=False)
            weights = shares if np.ptp(shares, axis=0).any() else shares[0]
        densities = [value("density", i) for i in range(count)]
        normalize, scale = value("normalize"), value("lambda")
        return TensorSettings(
            weights=weights,
            density=tuple(1.0 if one is None else float(one) for one in densities),
            normalize=None if normalize is None else bool(normalize),
            scale=1.0 if scale is None else float(scale),
            seed=self.seed,
        )

    def _named_weights(
        self, name: str, weights: Sequence[float | bool | None], t: float | bool | None
    ) -> np.ndarray:
        if self.method == "slerp":
            if t is None:
                raise DoRAError(f"slerp needs t, and none is given for {name}.")
            return np.array([1 - float(t), float(t)])
        if self.method == "karcher":
            return np.ones(len(weights))
        missing = [m for m, w in zip(self.models, weights, strict=True) if w is None]
        if missing:
            raise DoRAError(f"no weight for {name} of {', '.join(missing)}.")
        return np.array([float(one) for one in weights if one is not None])


def plan_models(
    models: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    method: str = "slerp",
    weights: Weights | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    fisher: Sequence[str | Path] | None = None,
) -> MergePlan:
    """Make a plan from the arguments of `mlx_dora.merge.merge_models`.

    Raises:
        DoRAError: If an argument is unknown or bad.
    """
    given = dict(parameters or {})
    if unknown := [key for key in given if key not in PARAMETERS]:
        raise DoRAError(
            f"parameters: unknown {', '.join(map(str, unknown))}; known are "
            f"{', '.join(PARAMETERS)}."
        )
    seed, pad = given.pop("seed", 0), given.pop("pad", False)
    is_seed = type(seed) is int and 0 <= seed < 2**64
    if not is_seed or type(pad) is not bool:
        raise DoRAError(
            f"seed must be a whole number of at least 0 and pad true or false, got "
            f"{seed!r}, {pad!r}."
        )
    return MergePlan(
        models=tuple(str(one) for one in models),
        base=None if base is None else str(base),
        method=method,
        granularity=given.pop("granularity", "row"),
        weights=weights,
        parameters=given,
        dtype=dtype,
        seed=seed,
        pad=pad,
        fisher=None if fisher is None else tuple(str(one) for one in fisher),
    )
