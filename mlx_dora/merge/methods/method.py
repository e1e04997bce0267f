"""What is asked about a method of merging, and its names in mergekit's YAML."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from mlx_dora.errors import DoRAError

Base = Literal["unused", "optional", "lengths", "changes"]
"""What a method takes from the base: nothing, changes of it where it is given, the
lengths of its rows, or always changes of it."""


@dataclass(frozen=True, kw_only=True)
class Mergekit:
    """How mergekit's YAML calls a method, and what it takes there.

    Attributes:
        name: ``merge_method``.
        weights: Where weights come from: each model's ``weight``, the interpolation
            parameter ``t``, or nowhere, all being equal.
        parameters: Names of the other parameters it takes.
        defaults: mergekit's defaults where ours differ.
        renamed: mergekit's name of a parameter to ours.
        inputs: Least and greatest number of models; None for the method's own.
        uses_base: Whether it takes changes of the base where there is one.
        starts_at_base: Whether the base is the first of the models it merges.
        row_when: A parameter, and the value at which tensors are merged row by row and
            not as a whole.
        only: Parameters of which one value alone is supported.
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
    """A method of merging.

    Attributes:
        name: What users write.
        summary: What a merged row is, for the documentation.
        paper: Where it is from; empty for our own.
        rows: ``module:function`` of `mlx_dora.merge.methods`, of a `Rows`; empty if
            the method is not a combination of rows.
        whole: The same for a tensor taken as one row, where that differs.
        blocks: ``module:function`` on dense tensors, block by block.
        inputs: Least and greatest number of inputs; None for any number.
        base: What it takes from the base.
        is_mean: Whether its weights are made to sum to 1.
        vectors: Whether tensors without rows (norm weights, biases) get the weighted
            mean, or are merged as one row.
        by_row_only: Whether it cannot take a tensor as one row.
        needs_fisher: Whether it takes the inputs' Fisher information.
        parameters: Names of the settings that it takes beside weights.
        density: Default share of the changes to keep.
        takes_weights: Whether inputs can be given weights.
        mergekit: Its names in mergekit's YAML.
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
    density: float | None = None
    takes_weights: bool = True
    mergekit: tuple[Mergekit, ...] = ()

    @property
    def needs_base(self) -> bool:
        """Whether a merge of models by it needs a base."""
        return self.base in ("lengths", "changes")

    @property
    def is_exact(self) -> bool:
        """Whether it merges adapters exactly, without a dense weight."""
        return bool(self.rows)

    @property
    def row_function(self) -> Any:
        """The function of rows."""
        return _load(self.rows)

    @property
    def whole_function(self) -> Any:
        """The function of a tensor taken as one row."""
        return _load(self.whole or self.rows)

    @property
    def block_function(self) -> Any:
        """The function on dense tensors."""
        return _load(self.blocks)

    def check_count(self, count: int, least: int | None = None) -> None:
        """Refuse a number of inputs that the method does not take.

        Args:
            count: How many there are.
            least: Fewest that are taken, in place of the method's.

        Raises:
            DoRAError: With the numbers.
        """
        fewest, most = self.inputs
        fewest = fewest if least is None else least
        if count < fewest or (most is not None and count > most):
            exact = f"{fewest}" if fewest == most else ""
            up_to = f"at most {most}" if most is not None and count > most else ""
            raise DoRAError(
                f"{self.name} takes {exact or up_to or f'at least {fewest}'} inputs, "
                f"got {count}."
            )

    def check_settings(self, given: Iterable[str], weights: object = None) -> None:
        """Refuse settings that have no effect on the method.

        Args:
            given: Names of settings.
            weights: The inputs' weights; None if there are none.

        Raises:
            DoRAError: Naming them, and the settings that have an effect.
        """
        if weights is not None and not self.takes_weights:
            raise DoRAError(f"{self.name} takes no weights: all inputs count alike.")
        if idle := [name for name in given if name not in self.parameters]:
            raise DoRAError(
                f"{', '.join(idle)} has no effect on {self.name}; it takes "
                f"{', '.join(self.parameters) or 'weights alone'}."
            )

    def note_of(self, density: Any) -> str | None:
        """What to say of a density at which nothing is dropped at random."""
        is_number = isinstance(density, int | float)
        if "seed" not in self.parameters or not is_number or density < 1:
            return None
        return f"{self.name} with density 1 drops nothing."


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(f"mlx_dora.merge.methods.{module}"), name)
