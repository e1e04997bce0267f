"""What a DoRA adapter is made of: rank, scale, and which modules it covers.

Imports no MLX, so that the command line can make its options from the fields.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mlx_dora.errors import DoRAError

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
    """How a model is adapted; field for field what each option means.

    Attributes:
        rank: Rank of the low-rank update.
        scale: Multiplier s of the update (mlx-lm's spelling; alpha / rank elsewhere).
        dropout: Dropout on the low-rank branch's input while training.
        keys: Names of the modules to adapt; None takes every linear layer and
            embedding of the chosen blocks.
        num_layers: How many blocks, counted from the last.
        variant: How the adapter is parametrised in training (docs/variants.md); what
            is saved is plain DoRA.
        rank_pattern: Ranks of single modules, by full path or by its end.
        use_rslora: Divide the scale by the square root of each module's rank.
        init: Where A and B start: at random and 0, or at the base's largest
            directions (PiSSA).
        magnitude_keys: Names of modules whose magnitude alone is trained, besides
            `keys`; where no keys are given, of those they are taken out.
        aux_width: Hidden units of ``doran-aux``'s networks, in multiples of the rank.
    """

    rank: int = field(default=8, metadata={"help": "Rank of the low-rank update."})
    scale: float = field(
        default=20.0, metadata={"help": "Multiplier of the low-rank update."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the low-rank branch in training."}
    )
    keys: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt, relative to a block (self_attn.q_proj) or as "
            "full paths; all linear layers and embeddings of the blocks if not given."
        },
    )
    num_layers: int = field(
        default=16,
        metadata={"help": "Blocks to adapt, from the last; -1 for all, 0 for none."},
    )
    variant: Variant = field(
        default="dora",
        metadata={
            "help": "Parametrisation of the adapter in training; what is saved is "
            "plain DoRA."
        },
    )
    rank_pattern: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Ranks of single modules: full path, or its end, to rank.",
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Divide the scale by the square root of the rank (rsLoRA)."},
    )
    init: Init = field(
        default="lora",
        metadata={
            "help": "Start of A and B: random and 0, or the base's largest directions; "
            "pissa is saved at twice the rank."
        },
    )
    magnitude_keys: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "Modules whose magnitude alone is trained, besides keys."},
    )
    aux_width: int = field(
        default=1,
        metadata={
            "help": "Variant doran-aux: hidden units of the networks for each rank."
        },
    )

    def __post_init__(self) -> None:
        _check_whole("rank", self.rank)
        if not _is_number(self.scale) or not math.isfinite(self.scale):
            raise DoRAError(f"scale must be a finite number, got {self.scale!r}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise DoRAError(
                f"dropout must be at least 0 and below 1, got {self.dropout!r}."
            )
        if type(self.num_layers) is not int or self.num_layers < -1:
            raise DoRAError(
                "num_layers must be -1 (all), 0 (none) or a number of blocks, got "
                f"{self.num_layers!r}."
            )
        if type(self.use_rslora) is not bool:
            raise DoRAError(
                f"use_rslora must be true or false, got {self.use_rslora!r}."
            )
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
        for name, kinds in (("variant", Variant), ("init", Init)):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise DoRAError(f"{name} must be {', '.join(known)}; got {value!r}.")
        if self.init == "pissa" and self.variant != "dora":
            raise DoRAError(
                f"init pissa is a start of variant dora, got variant {self.variant}."
            )
        if self.init == "pissa" and self.scale <= 0:
            raise DoRAError(
                "init pissa divides by the root of the scale, which must be above 0; "
                f"got {self.scale}."
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
        _check_whole("aux_width", self.aux_width)
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
        """Whether every layer is a plain DoRA (or LoRA) layer in training too."""
        return (self.variant, self.init, self.magnitude_keys) == ("dora", "lora", None)

    def _check_rank_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, Mapping):
            raise DoRAError(
                f"rank_pattern must map modules to ranks, got {self.rank_pattern!r}."
            )
        for name, rank in self.rank_pattern.items():
            if not isinstance(name, str) or not name:
                raise DoRAError(f"rank_pattern: {name!r} is not a module name.")
            _check_whole(f"rank_pattern: the rank of {name!r}", rank)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern) or None)

    def pattern_for(self, path: str) -> str | None:
        """The entry of `rank_pattern` that covers a module: the longest that fits."""
        fitting = [
            name
            for name in self.rank_pattern or {}
            if path == name or path.endswith(f".{name}")
        ]
        return max(fitting, key=len, default=None)

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`."""
        name = self.pattern_for(path)
        return self.rank if name is None else (self.rank_pattern or {})[name]

    def scale_of(self, path: str) -> float:
        """Multiplier of the module at `path`, rsLoRA's square root included."""
        if self.use_rslora:
            return self.scale / math.sqrt(self.rank_of(path))
        return float(self.scale)

    def lora_parameters(self) -> dict[str, Any]:
        """The part that mlx-lm keeps under ``lora_parameters``."""
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


def _is_number(value: object) -> bool:
    if isinstance(value, int):  # one that no float holds is no use as a factor
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _check_whole(what: str, value: object) -> None:
    if type(value) is not int:
        raise DoRAError(f"{what} must be a whole number, got {value!r}.")
    if value < 1:
        raise DoRAError(f"{what} must be at least 1, got {value}.")
