"""Settings of a DoRA adapter: rank, scale and adapted modules.

Does not import MLX, because the command line makes its options from the fields.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_dora.errors import DoRAError
from mlx_dora.options import check_options, option

_LORA_PARAMETERS = ("rank", "scale", "dropout", "keys")

Variant = Literal[
    "dora",
    "doran",
    "doran-aux",
    "map",
    "prediag",
    "magnitude",
    "adaptive",
    "edora",
    "bidora",
]
Init = Literal["lora", "pissa"]


@dataclass(frozen=True, kw_only=True)
class DoRAConfig:
    """How a model is adapted; each field's help text describes it.

    ``scale`` is the multiplier s of the update, as in mlx-lm (alpha / rank elsewhere).
    Every variant is saved as plain DoRA (docs/variants.md).
    """

    OPTION_GROUP = "Adapter"

    rank: int = option(
        8, help="Rank of the low-rank update.", least=1, group="Common options"
    )
    scale: float = option(
        20.0, help="Multiplier of the low-rank update.", group="Common options"
    )
    dropout: float = option(
        0.0, help="Dropout on the low-rank branch in training.", least=0, below=1
    )
    keys: tuple[str, ...] | None = option(
        None,
        help="Modules to adapt, relative to a block (self_attn.q_proj) or as full "
        "paths; by default, all linear layers and embeddings of the blocks.",
    )
    num_layers: int = option(
        16,
        help="Number of last blocks to adapt; -1 for all, 0 for none.",
        least=0,
        special=(-1,),
        group="Common options",
    )
    variant: Variant = option(
        "dora",
        help="Parametrization of the adapter in training; it is saved as plain DoRA.",
    )
    rank_pattern: dict[str, int] | None = option(
        None, help="Ranks of individual modules: full path, or its end, to rank."
    )
    use_rslora: bool = option(
        False, help="Divide the scale by the square root of the rank (rsLoRA)."
    )
    init: Init = option(
        "lora",
        help="Initial values of A and B: random and 0, or the base's largest singular "
        "directions (pissa), which are saved at twice the rank.",
    )
    magnitude_keys: tuple[str, ...] | None = option(
        None, help="Additional modules of which only the magnitude is trained."
    )
    aux_width: int = option(
        1,
        help="Variant doran-aux: hidden units per rank of the auxiliary networks.",
        least=1,
        variant="doran-aux",
        group="Advanced",
    )

    def __post_init__(self) -> None:
        check_options(self)
        self._check_keys("keys")
        self._check_keys("magnitude_keys")
        self._check_rank_pattern()
        self._check_variant()

    def _check_keys(self, name: str) -> None:
        keys = getattr(self, name)
        if keys is None:
            return
        is_list = isinstance(keys, Iterable) and not isinstance(keys, str | Mapping)
        if not is_list or not all(isinstance(key, str) and key for key in keys):
            raise DoRAError(f"{name} must be a list of module names, got {keys!r}.")
        if not keys:
            raise DoRAError(
                f"{name} must name a module or be left out, got an empty list."
            )
        object.__setattr__(self, name, tuple(dict.fromkeys(keys)))

    def _check_variant(self) -> None:
        if self.init == "pissa" and self.variant != "dora":
            raise DoRAError(
                f"init pissa needs variant dora, got variant {self.variant}."
            )
        if self.init == "pissa" and self.scale <= 0:
            raise DoRAError(
                "init pissa divides by the square root of the scale, which must be "
                f"above 0; got {self.scale}."
            )
        if self.variant not in ("dora", "magnitude") and not self.scale:
            raise DoRAError(
                f"variant {self.variant} multiplies its low-rank part by the scale, "
                "which is 0."
            )
        if self.variant == "magnitude":
            useless = [
                name
                for name in ("rank_pattern", "magnitude_keys", "dropout", "use_rslora")
                if getattr(self, name)
            ]
            if useless:
                raise DoRAError(
                    "variant magnitude trains no low-rank part: leave out "
                    f"{', '.join(useless)}."
                )
        if self.aux_width > 1 and self.variant != "doran-aux":
            raise DoRAError(
                f"aux_width belongs to variant doran-aux, got variant {self.variant}."
            )
        both = set(self.keys or ()).intersection(self.magnitude_keys or ())
        if both:
            raise DoRAError(
                f"keys and magnitude_keys both name {', '.join(sorted(both))}."
            )

    @property
    def is_plain(self) -> bool:
        """Whether every layer is a plain DoRA or LoRA layer during training, too."""
        return (self.variant, self.init, self.magnitude_keys) == ("dora", "lora", None)

    def _check_rank_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        for name, rank in self.rank_pattern.items():
            if not isinstance(name, str) or not name:
                raise DoRAError(f"rank_pattern: {name!r} is not a module name.")
            _check_whole(f"rank_pattern: the rank of {name!r}", rank)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern) or None)

    def pattern_for(self, path: str) -> str | None:
        """Return the longest key of `rank_pattern` that matches a module, or None."""
        fitting = [
            name
            for name in self.rank_pattern or {}
            if path == name or path.endswith(f".{name}")
        ]
        return max(fitting, key=len, default=None)

    def rank_of(self, path: str) -> int:
        """Return the rank of the module at `path`."""
        name = self.pattern_for(path)
        return self.rank if name is None else (self.rank_pattern or {})[name]

    def scale_of(self, path: str) -> float:
        """Return the multiplier of the module at `path`, including rsLoRA's factor."""
        if self.use_rslora:
            return self.scale / math.sqrt(self.rank_of(path))
        return float(self.scale)

    def lora_parameters(self) -> dict[str, Any]:
        """Return the settings that mlx-lm stores under ``lora_parameters``."""
        parameters: dict[str, Any] = {
            "rank": self.rank,
            "scale": self.scale,
            "dropout": self.dropout,
        }
        if self.keys is not None:
            parameters["keys"] = list(self.keys)
        return parameters

    @staticmethod
    def from_lora_parameters(
        parameters: Mapping[str, Any], *, num_layers: int = 16
    ) -> "DoRAConfig":
        """Make a config from mlx-lm's ``lora_parameters`` and ``num_layers``.

        Raises:
            DoRAError: For a key that mlx-lm does not have, or a bad value.
        """
        if not isinstance(parameters, Mapping):
            raise DoRAError(f"lora_parameters must be a mapping, got {parameters!r}.")
        unknown = [str(key) for key in parameters if key not in _LORA_PARAMETERS]
        if unknown:
            hint = (
                " mlx-lm's config uses 'scale' (alpha / rank), not 'alpha'."
                if "alpha" in unknown
                else ""
            )
            raise DoRAError(
                f"lora_parameters: unknown keys {', '.join(unknown)}; known are "
                f"{', '.join(_LORA_PARAMETERS)}.{hint}"
            )
        given = {key: value for key, value in parameters.items() if value is not None}
        return DoRAConfig(num_layers=num_layers, **given)


def _check_whole(what: str, value: object) -> None:
    if type(value) is not int:
        raise DoRAError(f"{what} must be a whole number, got {value!r}.")
    if value < 1:
        raise DoRAError(f"{what} must be at least 1, got {value}.")
