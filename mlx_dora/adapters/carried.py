"""What of a base checkpoint mlx-lm's text model leaves out, for a fuse to carry along.

mlx-lm loads a multimodal checkpoint as its text model: vision towers, projectors and
prediction heads are dropped by the model's ``sanitize``, which renames, stacks or drops
tensors by rules of its own. Here it is run with and without groups of tensors, and with
empty ones in their place: what makes no difference was dropped.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.keys import natural_order, shortened
from mlx_dora.io.weight_files import weight_files

Tensors = dict[str, mx.array]
_Sanitize = Callable[[Tensors], Tensors]
# Name to shape, and to identity where an input array came through as it was.
_Signature = dict[str, tuple[int | None, tuple[int, ...]]]

# What a model's sanitize raises when a tensor that it needs is missing.
_NEEDED = (LookupError, ValueError, TypeError, AttributeError, RuntimeError)
# A tied model's stored copy of its embedding; wrong once the embedding is adapted.
_HEAD_COPY = ("lm_head.weight", "lm_head.scales", "lm_head.biases")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Tensors of a base checkpoint that belong into the fused folder untouched.

    Attributes:
        names: Their names in the base's own files, to those in the fused folder.
        left_out: Names of those that would keep mlx-lm from loading the fused folder
            as the model that it is.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def warn(self) -> None:
        """Say what is renamed and what is left out."""
        renamed = [old for old, new in self.names.items() if old != new]
        if renamed:
            logger.warning(
                "%d tensors of the base are carried along without their leading "
                "'model.', the names of earlier checkpoints, since mlx-lm could not "
                "load the fused model otherwise (%s)",
                len(renamed),
                shortened(renamed),
            )
        if self.left_out:
            logger.warning(
                "left out of the fused model, since mlx-lm could not load it with "
                "them: %d tensors of the base (%s)",
                len(self.left_out),
                shortened(self.left_out),
            )


def carried_along(folder: Path, *, trust_remote_code: bool = False) -> Carried:
    """Find the tensors of a base that mlx-lm's model of it leaves out.

    No tensor is read. Stored copies of a tied head are not among them: the embedding
    takes their place.

    Args:
        folder: The base's local folder.
        trust_remote_code: Run Python code that the folder brings along.

    Raises:
        DoRAError: If mlx-lm cannot load the model.
    """
    weights: Tensors = {}
    for path in weight_files(folder):
        weights |= cast(Tensors, mx.load(str(path)))
    model = load_lazily(folder, trust_remote_code=trust_remote_code)
    params = cast(Tensors, dict(tree_flatten(model.parameters())))
    sanitize: _Sanitize | None = getattr(model, "sanitize", None)
    if sanitize is None or weights.keys() <= params.keys():
        return Carried()
    whole = _signature(sanitize, weights)
    again = _signature(sanitize, params)
    safe: dict[str, str] = {}
    left_out: list[str] = []
    for names in _candidates(sanitize, weights, params):
        without = {k: weights[k] for k in weights.keys() - set(names)}
        # A name alone may steer what happens to others: there, but without a number.
        empty = {k: mx.zeros((0,) * (weights[k].ndim or 1)) for k in names}
        if whole not in (
            _signature(sanitize, without),
            _signature(sanitize, weights | empty),
        ):
            continue  # they go into the model, stacked or computed with
        for chosen in _spellings(names):
            beside = {new: weights[old] for old, new in (safe | chosen).items()}
            signature = _signature(sanitize, params | beside, params)
            if again is not None and signature == again:
                safe |= chosen
                break
        else:
            left_out += names
    return Carried(
        names={name: safe[name] for name in sorted(safe, key=natural_order)},
        left_out=tuple(sorted(left_out, key=natural_order)),
    )


def _spellings(names: list[str]) -> list[dict[str, str]]:
    """Names to try: the base's own, then without the leading ``model.``.

    Newer checkpoints nest towers and text under ``model``; where mlx-lm writes the text
    without it, it knows the tower by its earlier name alone.
    """
    earlier = {name: name.removeprefix("model.") for name in names}
    return [{name: name for name in names}, earlier]


def carried_tensors(
    folder: Path,
    carried: Carried,
    quantization: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """Read tensors from the base's files, lazily, one after the other.

    Args:
        folder: The base's local folder.
        carried: Which ones, and what they are called in the fused folder.
        quantization: The base's ``quantization``, to make packed tensors dense; None
            leaves them packed.
    """
    wanted = carried.names
    for path in weight_files(folder):
        loaded = cast(Tensors, mx.load(str(path)))
        here = {name: loaded[name] for name in wanted if name in loaded}
        del loaded
        while here:
            name = next(iter(here))
            module, _, leaf = name.rpartition(".")
            if quantization is None or f"{module}.scales" not in wanted:
                yield wanted[name], here.pop(name)
                continue
            value = here.pop(name)
            if leaf == "weight":
                parts = _parts(folder, module)
                settings = quantization.get(module) or quantization
                yield (
                    wanted[name],
                    mx.dequantize(
                        value,
                        parts["scales"],
                        parts.get("biases"),
                        group_size=settings.get("group_size"),
                        bits=settings.get("bits"),
                        mode=settings.get("mode", "affine"),
                    ),
                )
            elif leaf not in ("scales", "biases"):
                yield wanted[name], value


def _parts(folder: Path, module: str) -> Tensors:
    """Scales and biases of a packed module, which may be in another file."""
    parts: Tensors = {}
    for path in weight_files(folder):
        loaded = cast(Tensors, mx.load(str(path)))
        for leaf in ("scales", "biases"):
            if f"{module}.{leaf}" in loaded:
                parts[leaf] = loaded[f"{module}.{leaf}"]
    return parts


def _candidates(
    sanitize: _Sanitize, weights: Tensors, params: Tensors
) -> list[list[str]]:
    """Tensors that do not come through as they are, in groups of one place.

    A place is the shortest prefix under which nothing comes through, with numbers
    passed over: ``vision_tower``, ``model.layers.*.mlp.experts``.
    """
    through = {id(value) for value in sanitize(dict(weights)).values()}
    candidates = [
        name
        for name, value in weights.items()
        if id(value) not in through
        and name not in params
        and not name.endswith(_HEAD_COPY)
    ]
    taken: set[str] = set()
    for name in weights.keys() - set(candidates):
        taken.update(_prefixes(name))
    groups: dict[str, list[str]] = {}
    for name in candidates:
        place = next((p for p in _prefixes(name) if p not in taken), name)
        parts = ("*" if part.isdigit() else part for part in place.split("."))
        groups.setdefault(".".join(parts), []).append(name)
    return list(groups.values())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _signature(
    sanitize: _Sanitize, weights: Tensors, of: Tensors | None = None
) -> _Signature | None:
    """What sanitize makes of tensors; None if it cannot do without another.

    Args:
        sanitize: The model's.
        weights: Its input.
        of: The tensors whose identity counts; all if None.
    """
    known = {id(value) for value in (weights if of is None else of).values()}
    try:
        made = sanitize(dict(weights))
    except _NEEDED:
        return None
    return {
        name: (id(value) if id(value) in known else None, value.shape)
        for name, value in made.items()
    }
