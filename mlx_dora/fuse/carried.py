"""Finds tensors of a base that mlx-lm's text model drops, so that a fuse keeps them.

mlx-lm loads a multimodal checkpoint as a text model: the model's ``sanitize`` drops
vision towers, projectors and prediction heads, and renames or stacks other tensors.
This module runs ``sanitize`` with and without groups of tensors, and with empty tensors
in their place. Groups that make no difference are dropped by ``sanitize``.
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
# Shape by name and, for input arrays that pass through unchanged, identity by name.
_Signature = dict[str, tuple[int | None, tuple[int, ...]]]

# Raised by a model's sanitize when a tensor that it needs is missing.
_NEEDED = (LookupError, ValueError, TypeError, AttributeError, RuntimeError)
# A tied model's stored copy of its embedding, which is wrong after a fuse changes it.
_HEAD_COPY = ("lm_head.weight", "lm_head.scales", "lm_head.biases")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Tensors of a base checkpoint to copy unchanged into the fused folder.

    Attributes:
        names: Map from names in the base's files to names in the fused folder.
        left_out: Names of tensors that would prevent mlx-lm from loading the fused
            folder correctly.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def warn(self) -> None:
        """Warn about tensors that are renamed or left out."""
        renamed = [old for old, new in self.names.items() if old != new]
        if renamed:
            logger.warning(
                "%d tensors of the base are copied without their leading 'model.', as "
                "in earlier checkpoints, because mlx-lm could not load the fused "
                "model otherwise (%s)",
                len(renamed),
                shortened(renamed),
            )
        if self.left_out:
            logger.warning(
                "left out of the fused model, because mlx-lm could not load it with "
                "them: %d tensors of the base (%s)",
                len(self.left_out),
                shortened(self.left_out),
            )


def carried_along(folder: Path, *, trust_remote_code: bool = False) -> Carried:
    """Find the tensors of a base that mlx-lm's model drops.

    No tensor is read. Stored copies of a tied head are excluded, because the embedding
    replaces them.

    Args:
        folder: The base's local folder.
        trust_remote_code: Allow Python code in the folder to run.

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
        # A name alone may affect other tensors, so keep it with an empty tensor.
        empty = {k: mx.zeros((0,) * (weights[k].ndim or 1)) for k in names}
        if whole not in (
            _signature(sanitize, without),
            _signature(sanitize, weights | empty),
        ):
            continue  # the model uses them, stacked or in a computation
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
    """Return names to try: the base's own, then without the leading ``model.``.

    Newer checkpoints nest towers and text under ``model``. Where mlx-lm writes the text
    without this prefix, it recognizes the tower only by its earlier name.
    """
    earlier = {name: name.removeprefix("model.") for name in names}
    return [{name: name for name in names}, earlier]


def carried_tensors(
    folder: Path,
    carried: Carried,
    quantization: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """Yield tensors from the base's files lazily, one at a time.

    Args:
        folder: The base's local folder.
        carried: The tensors, with their names in the fused folder.
        quantization: The base's ``quantization``, to dequantize packed tensors; None
            keeps them packed.
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
    """Return scales and biases of a packed module, which may be in another file."""
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
    """Return tensors that do not pass through unchanged, grouped by prefix.

    A group's prefix is the shortest under which no tensor passes through; numbers are
    wildcards: ``vision_tower``, ``model.layers.*.mlp.experts``.
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
    """Describe the output of sanitize; None if it needs a tensor that is missing.

    Args:
        sanitize: The model's method.
        weights: The input of `sanitize`.
        of: The tensors whose identity is compared; None for all.
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
