"""Description of a merge method, and of its form in mergekit's YAML."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

from mlx_dora.errors import DoRAError

Base = Literal["unused", "optional", "lengths", "changes"]
"""How a method uses the base: not at all, for changes from it if it is given, for the
lengths of its rows, or always for changes from it."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter that belongs to one method.

    Attributes:
        name: Name, as in mergekit.
        help: What it is, for the documentation.
        default: Default value; None if it must be given.
        least: Least value.
        most: Greatest value.
        per_input: Whether each input has its own value.
    """

    name: str
    help: str
    default: float | None = None
    least: float = 0.0
    most: float = math.inf
    per_input: bool = False

    def checked(self, value: Any) -> float:
        """Check a value.

        Raises:
            DoRAError: With the expected range and the given value.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.least <= value <= self.most:
            up_to = f" to {self.most:g}" if math.isfinite(self.most) else " or more"
            raise DoRAError(f"{self.name} must be {self.least:g}{up_to}, got {value}.")
        return float(value)


@dataclass(frozen=True)
class Mergekit:
    """How mergekit's YAML names a method and its parameters.

    Attributes:
        name: Value of ``merge_method``.
        weights: Source of the weights: each model's ``weight``, the interpolation
            parameter ``t``, or equal weights.
        parameters: Names of the other parameters it accepts.
        defaults: mergekit's defaults where they differ from ours.
        renamed: Our parameter names by mergekit's names.
        inputs: Minimum and maximum number of models; None for the method's own.
        uses_base: Whether it merges changes from the base if there is one.
        starts_at_base: Whether the base is the first of the models it merges.
        row_when: A parameter, and the value at which tensors are merged row by row
            instead of as a whole.
        only: Parameters that support only the given value.
    """

    name: str
    weights: Literal["weight", "t", "equal"] = "weight"
    parameters: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[int, int | None] | None = None
    uses_base: bool = False
    starts_at_base: bool = False
    row_when: tuple[str, bool] | None = None
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> tuple[str, ...]:
        """Every parameter of the YAML that has an effect."""
        first = {"weight": ("weight",), "t": ("t",), "equal": ()}[self.weights]
        own = tuple(key for key in first if key not in self.renamed.values())
        switch = () if self.row_when is None else self.row_when[:1]
        return (*own, *self.parameters, *switch, *self.only)


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method.

    Attributes:
        name: Name for users.
        summary: What a merged row is, for the documentation.
        paper: Reference; empty for our own methods.
        rows: ``module:function`` in `mlx_dora.merge.methods`, a function of `Rows`;
            empty if the method is not a combination of rows.
        whole: The function for a tensor treated as one row, if it differs from `rows`.
        blocks: ``module:function`` on dense tensors, block by block.
        inputs: Minimum and maximum number of inputs; None for no maximum.
        base: How it uses the base.
        is_mean: Whether its weights are normalized to sum to 1.
        vectors: Whether tensors without rows (norm weights, biases) get the weighted
            mean, or are merged as one row.
        by_row_only: Whether it cannot treat a tensor as one row.
        needs_fisher: Whether it uses the inputs' Fisher information.
        parameters: Names of the shared settings that it uses besides weights.
        own: Parameters that only this method has.
        density: Default fraction of the changes to keep.
        takes_weights: Whether it accepts weights of the inputs.
        reads_base: Whether it uses the values of W0, not only the changes from it, so
            that it cannot merge adapters in another space.
        space: Space (`mlx_dora.merge.methods.spaces`) in which it merges adapters if
            none is chosen, unless it is a function of rows.
        mergekit: Its forms in mergekit's YAML.
    """

    name: str
    summary: str
    paper: str = ""
    rows: str = ""
    whole: str = ""
    blocks: str = ""
    inputs: tuple[int, int | None] = (1, None)
    base: Base = "unused"
    is_mean: bool = False
    vectors: Literal["mean", "row"] = "mean"
    by_row_only: bool = False
    needs_fisher: bool = False
    parameters: tuple[str, ...] = ()
    own: tuple[Parameter, ...] = ()
    density: float | None = None
    takes_weights: bool = True
    reads_base: bool = False
    space: str = "weight"
    mergekit: Sequence[Mergekit] = ()

    @cached_property
    def needs_base(self) -> bool:
        """Whether merging models by this method needs a base."""
        return self.base in ("lengths", "changes")

    @cached_property
    def is_exact(self) -> bool:
        """Whether it merges adapters exactly, without a dense weight."""
        return bool(self.rows)

    @cached_property
    def takes_space(self) -> bool:
        """Whether it merges the changes of adapters in any space."""
        return bool(self.blocks) and self.base == "changes" and not self.reads_base

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """Names of all settings that have an effect, besides weights."""
        return (*self.parameters, *(parameter.name for parameter in self.own))

    def own_values(
        self, count: int, given: Callable[[str, int | None], Any]
    ) -> dict[str, float | tuple[float, ...]]:
        """Values of the method's own parameters, checked, for `count` inputs.

        `given` returns the value of a parameter for an input (None for all inputs), or
        None for the default.

        Raises:
            DoRAError: If a value is out of range, or missing without a default.
        """
        values: dict[str, float | tuple[float, ...]] = {}
        for parameter in self.own:
            places = range(count) if parameter.per_input else [None]
            each = []
            for place in places:
                value = given(parameter.name, place)
                value = parameter.default if value is None else value
                if value is None:
                    raise DoRAError(f"{self.name} needs a value of {parameter.name}.")
                each.append(parameter.checked(value))
            values[parameter.name] = tuple(each) if parameter.per_input else each[0]
        return values

    @cached_property
    def row_function(self) -> Any:
        """The function of rows."""
        return function_at(self.rows)

    @cached_property
    def whole_function(self) -> Any:
        """The function of a tensor treated as one row."""
        return function_at(self.whole or self.rows)

    @cached_property
    def block_function(self) -> Any:
        """The function on dense tensors."""
        return function_at(self.blocks)

    def check_count(self, count: int, least: int | None = None) -> None:
        """Refuse a number of inputs that the method cannot merge.

        `least` is a minimum in place of the method's own.

        Raises:
            DoRAError: With the expected and the given number.
        """
        fewest, most = self.inputs
        fewest = fewest if least is None else least
        if count < fewest or (most is not None and count > most):
            exact = f"{fewest}" if fewest == most else ""
            up_to = f"at most {most}" if most is not None and count > most else ""
            raise DoRAError(
                f"{self.name} merges {exact or up_to or f'at least {fewest}'} inputs, "
                f"got {count}."
            )

    def check_settings(self, given: Iterable[str], weights: object = None) -> None:
        """Refuse settings (by name) and weights that have no effect on the method.

        Raises:
            DoRAError: Naming these settings, and those that have an effect.
        """
        if weights is not None and not self.takes_weights:
            raise DoRAError(
                f"{self.name} uses no weights, all inputs count equally: leave the "
                "weights out."
            )
        if idle := [name for name in given if name not in self.uses]:
            what = "only weights" if self.takes_weights else "no settings"
            raise DoRAError(
                f"{', '.join(idle)} has no effect on {self.name}; it uses "
                f"{', '.join(self.uses) or what}."
            )

    def note_of(self, density: Any) -> str | None:
        """A note if random dropping has no effect at a density; None otherwise."""
        is_number = isinstance(density, int | float)
        if "seed" not in self.parameters or not is_number or density < 1:
            return None
        return f"{self.name} with density 1 drops nothing."


def function_at(where: str) -> Any:
    """Import ``module:function`` of `mlx_dora.merge.methods`."""
    module, _, name = where.partition(":")
    return getattr(import_module(f"mlx_dora.merge.methods.{module}"), name)
