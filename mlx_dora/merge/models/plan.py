"""The plan of a merge of models: its inputs and settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_dora.errors import DoRAError
from mlx_dora.merge.methods import DEFAULT, MergeMethod, method_named
from mlx_dora.merge.methods.settings import TensorSettings, check_seed
from mlx_dora.merge.methods.table import own_parameters
from mlx_dora.merge.models.place import Place
from mlx_dora.merge.models.settings import check_setting, resolve
from mlx_dora.merge.models.tokenizer_plan import TokenizerPlan
from mlx_dora.merge.weights import Weights, check_weights, row_weights

PARAMETERS = (
    "density",
    "normalize",
    "lambda",
    "rescale",
    "seed",
    "granularity",
    "pad",
    *own_parameters(),
)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Inputs and settings of a merge of models.

    Attributes:
        models: Folders or Hub ids of the models to merge.
        base: The base that changes are relative to, also the pattern for the output;
            None makes the first model the pattern.
        method: Name of the method.
        granularity: ``"row"`` or ``"tensor"``.
        weighting: Source of the weights: each model's ``weight``, ``t``, or equal
            weights; None uses `weights`.
        weights: As in `merge_models`; None for equal weights.
        per_model: Settings of each model by name (``weight``, ``density``), which take
            precedence over `parameters`.
        parameters: Settings of all models by name.
        dtype: Dtype of the output; None keeps the pattern's.
        seed: Random seed for DARE.
        pad: Merge embeddings of different vocabulary sizes.
        relative: Whether a mean merges changes from the base, if there is one.
        fisher: Folders of Fisher information, one per model, for method ``fisher``.
        starts: First block that is merged of each model, in a part.
        base_start: First block of the base, in a part.
        count: Number of blocks of the output that a part makes; None for whole models.
        parts: Plans of consecutive slices of the output's blocks; empty for whole
            models. With parts, `models` lists all models, `base` gives the config, and
            the settings of the tensors are those of the parts.
        tokenizer: The output's tokenizer; None keeps the pattern's, unchecked.
        chat_template: ``"auto"`` for the most frequent template of the models, or a
            template's text; None keeps the tokenizer's.
        notes: Notes about the settings, one sentence each.
    """

    models: tuple[str, ...]
    base: str | None = None
    method: str = DEFAULT
    granularity: str = "row"
    weighting: Literal["weight", "t", "equal"] | None = None
    weights: Weights | None = None
    per_model: tuple[Mapping[str, Any], ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    pad: bool = False
    relative: bool = True
    fisher: tuple[str, ...] | None = None
    starts: tuple[int, ...] = ()
    base_start: int = 0
    count: int | None = None
    parts: tuple["MergePlan", ...] = ()
    tokenizer: TokenizerPlan | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.models)
        entry = method_named(self.method)
        if not count:
            raise DoRAError("give at least one model to merge.")
        if not self.parts:
            entry.check_count(count)
        if self.base is None and entry.needs_base and not self.parts:
            raise DoRAError(
                f"{self.method} needs a base: give base (--base, or base_model in a "
                "merge config)."
            )
        if self.granularity not in ("row", "tensor"):
            raise DoRAError(
                f"granularity must be row or tensor, got {self.granularity!r}."
            )
        if self.granularity == "tensor" and entry.by_row_only:
            raise DoRAError(
                f"{self.method} weighs rows: use granularity row, not tensor."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DoRAError(f"dtype must be {', '.join(DTYPES)}, got {self.dtype!r}.")
        check_seed(self.seed)
        if type(self.pad) is not bool:
            raise DoRAError(f"pad must be true or false, got {self.pad!r}.")
        check_weights(self.weights, count)
        for settings in (self.parameters, *self.per_model):
            for name, setting in settings.items():
                check_setting(name, setting)

    @property
    def names(self) -> list[str]:
        """All models that are merged, each once: the inputs, then the base."""
        bases = [self.base, *(part.base for part in self.parts)]
        every = [*self.models, *bases]
        return list(dict.fromkeys(name for name in every if name is not None))

    @property
    def inputs(self) -> list[str | None]:
        """All folders and Hub ids that the merge reads."""
        folders = [part for name in self.names for part in (name, *name.split("+"))]
        tokenizer = None if self.tokenizer is None else self.tokenizer.model
        return [*folders, *(self.fisher or ()), tokenizer]

    @property
    def entry(self) -> MergeMethod:
        """The merge method."""
        return method_named(self.method)

    def settings_of(self, place: Place, rows: int) -> TensorSettings:
        """Settings for merging a tensor of some rows."""
        count = len(self.models)

        def value(key: str, i: int | None = None) -> Any:
            own = self.per_model[i] if i is not None and self.per_model else {}
            name = place.name if i is None else place.sources[i]
            given = (part[key] for part in (own, self.parameters) if key in part)
            values = (resolve(setting, name, place.depth) for setting in given)
            return next((value for value in values if value is not None), None)

        def values(key: str) -> list[Any]:
            return [value(key, i) for i in range(count)]

        if self.weighting is not None:
            weights = self._named_weights(place.name, values("weight"), value("t"))
        else:
            module = place.name.removesuffix(".weight").removesuffix(".bias")
            given = check_weights(self.weights, count)
            shares = row_weights(given, {module: rows}, normalize=False)[module]
            weights = shares if np.ptp(shares, axis=0).any() else shares[0]
        kept = self.entry.density or 1.0
        normalize, scale = value("normalize"), value("lambda")
        rescale = value("rescale")
        return TensorSettings(
            weights=weights,
            density=tuple(kept if d is None else float(d) for d in values("density")),
            normalize=None if normalize is None else bool(normalize),
            scale=1.0 if scale is None else float(scale),
            seed=self.seed,
            rescale=None if rescale is None else bool(rescale),
            as_mergekit=self.granularity == "tensor",
            own=self.entry.own_values(count, value),
        )

    def _named_weights(
        self, name: str, weights: Sequence[float | None], t: float | None
    ) -> np.ndarray:
        if self.weighting == "t":
            if t is None:
                raise DoRAError(
                    f"{self.method} needs parameter t, which is not set for {name}."
                )
            return np.array([1 - float(t), float(t)])
        if self.weighting == "equal":
            return np.ones(len(weights))
        missing = [m for m, w in zip(self.models, weights, strict=True) if w is None]
        if missing:
            raise DoRAError(f"no weight for {name} of {', '.join(missing)}.")
        return np.array([float(weight) for weight in weights if weight is not None])


def plan_models(
    models: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    method: str = DEFAULT,
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
    entry = method_named(method)
    entry.check_settings([name for name in given if name != "granularity"], weights)
    note = entry.note_of(given.get("density", entry.density))
    return MergePlan(
        models=tuple(str(path) for path in models),
        base=None if base is None else str(base),
        method=method,
        granularity=given.pop("granularity", "row"),
        weights=weights,
        parameters=given,
        dtype=dtype,
        seed=seed,
        pad=pad,
        fisher=None if fisher is None else tuple(str(path) for path in fisher),
        notes=() if note is None else (note,),
    )
