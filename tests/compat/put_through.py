"""One tiny model through everything: adapt, train, save, load, fuse, compare."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_dora import (
    DoRAConfig,
    DoRAError,
    apply_dora,
    fuse_dora,
    load_adapter,
    save_adapter,
)
from mlx_dora.adapters.attach import attach_adapter
from mlx_dora.adapters.keys import blocks, passed_over
from mlx_dora.adapters.surgery import adaptable_paths, dora_layers, remove_dora
from mlx_dora.layers import dora_class
from tests.compat.tiny_models import build
from tests.compat.tiny_sizes import LAYERS, READ_DIRECTLY, VOCABULARY

TOKENS = mx.array([[(5 * i + 3 * j) % VOCABULARY for j in range(12)] for i in range(2)])
ALL = DoRAConfig(rank=2, scale=2.0, num_layers=-1)
# Relative to the largest logit. Layers start and load to the bit, but compiled
# activations of mlx-lm round by the layout of what they get.
EXACT = 1e-5
BOUND = 2e-4
# Rounds keys and values to fp8 and fp4, where a last bit becomes a step: weights off by
# 1e-5 at random, without any adapter, move these logits by up to .1.
COARSE = {"deepseek_v41": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a model.

    Attributes:
        state: ``works``; ``in part``: it does without the modules refused; ``refused``:
            nothing is left without them; ``broken``: mlx-lm's own code fails, and its
            LoRA with it; ``fails``: ours does.
        adapted: How many modules were.
        bases: The classes of these modules, by name.
        idle: Those that training leaves alone in every block, named within it.
        reason: What keeps it from ``works``.
        lora: What mlx-lm's own LoRA does then, by default.
    """

    name: str
    state: str
    adapted: int = 0
    bases: frozenset[str] = frozenset()
    idle: tuple[str, ...] = ()
    reason: str = ""
    lora: str = ""


def put_through(name: str, bits: int | None = None) -> Outcome:
    """Say how far the model of that name comes, packed into `bits` if given."""
    try:
        model = build(name, bits)
    # What mlx-lm's code raises, here and below.
    except Exception as error:
        return Outcome(name=name, state="broken", reason=f"not built: {_told(error)}")
    refusal = _refusal(model)
    keys, reason = _what_can_be(name, model)
    if keys and (reason or not refusal):
        found = _adapted(name, bits, keys, model)
    else:
        found = Outcome(name=name, state="refused", reason=reason or refusal)
    if found.state == "works" and reason:
        found = replace(found, state="in part", reason=reason)
    if found.state == "works":
        return found
    lora = _with_lora(name, bits)
    if found.state == "stops":
        found = replace(found, state="fails" if lora == "trains" else "broken")
    return replace(found, lora=lora)


def _refusal(model: nn.Module) -> str:
    """What is said to adapting it by default."""
    try:
        apply_dora(model, ALL)
    except DoRAError as error:
        return str(error)
    remove_dora(model)
    return ""


def _is_narrow(module: nn.Module) -> bool:
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim == 2 and weight.shape[0] < 2


def _what_can_be(name: str, model: nn.Module) -> tuple[list[str], str]:
    """All in the blocks that can be adapted; what else is meant by default, and why."""
    default = {*adaptable_paths(model, ALL), *passed_over(model, -1)}
    places = tuple(f"{path}." for path, _ in blocks(model))
    keys: list[str] = []
    others: dict[str, str] = {}
    for path, module in model.named_modules():
        short = _within_block(path)
        if not path.startswith(places):
            continue
        if short in READ_DIRECTLY.get(name, ()):
            others[short] = "the model's own code reads the weight"
        elif _takes_dora(module):
            keys.append(path)
        elif path in default:
            others[short] = f"{type(module).__name__} cannot take DoRA"
    told = []
    for why in dict.fromkeys(others.values()):
        which = ", ".join(sorted(short for short in others if others[short] == why))
        told.append(f"{which if keys else 'every linear layer'}: {why}")
    return keys, "; ".join(told)


def _takes_dora(module: nn.Module) -> bool:
    try:
        dora_class(module)
    except DoRAError:
        return False
    return True


def _adapted(name: str, bits: int | None, keys: list[str], model: Any) -> Outcome:
    """The outcome where these modules are adapted."""
    base, stop = None, ""
    try:
        base = _logits(model)
    except Exception as error:
        stop = f"the plain model does not run: {_told(error)}"
    # A gate with one output takes no more than rank 1.
    narrow = {path: 1 for path, module in model.named_modules() if _is_narrow(module)}
    config = replace(ALL, keys=tuple(keys), rank_pattern=narrow or None)
    paths = apply_dora(model, config)
    if base is not None:
        stop = _training_problem(model, base)
    if stop:
        _update_at_random(model)
    problem = _keeping_problem(name, bits, model, runs=base is not None)
    layers = dict(dora_layers(model))
    moved = [path for path, layer in layers.items() if mx.any(layer.lora_b)]
    bases = frozenset(type(layer.base).__name__ for layer in layers.values())
    if bits is not None and not any(base.startswith("Quantized") for base in bases):
        problem = problem or "nothing that is adapted is packed"
    return Outcome(
        name=name,
        state="fails" if problem else "stops" if stop else "works",
        adapted=len(paths),
        bases=bases,
        idle=tuple(sorted(_short(layers) - _short(moved))),
        reason="; ".join(
            filter(None, (stop, problem or (stop and "it is saved, loaded and fused")))
        ),
    )


def _training_problem(model: Any, base: mx.array) -> str:
    if not mx.any(base):
        return "a random model of this class gives zeros"
    try:
        if (off := _off(_logits(model), base)) > EXACT:
            return f"an untrained adapter changes the logits by {off:.1e}"
        losses = _train(model)
    except Exception as error:
        return f"training: {_told(error)}"
    finally:
        model.eval()
    return "" if losses[-1] < losses[0] else f"training: the losses are {losses}"


def _keeping_problem(name: str, bits: int | None, model: Any, *, runs: bool) -> str:
    """What is wrong with the adapter saved, loaded and fused."""
    adapted = _logits(model) if runs else None
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "adapter")
        adapter = load_adapter(Path(folder) / "adapter")
    again: Any = build(name, bits)
    attach_adapter(again, adapter)
    if adapted is None:
        fuse_dora(again, dequantize=bits is not None)
        return ""
    if (off := _off(_logits(again), adapted)) > EXACT:
        return f"loaded, logits are off by {off:.1e}"
    # Packed again it would lose part of the update: told by fuse_dora, not wrong.
    fuse_dora(again, dequantize=bits is not None)
    off = _off(_logits(again), adapted)
    return (
        "" if off < COARSE.get(name, BOUND) else f"fused, logits are off by {off:.1e}"
    )


def _short(paths: Iterable[str]) -> set[str]:
    return {_within_block(path) for path in paths}


def _within_block(path: str) -> str:
    return re.sub(r"^.*?(layers|blocks|h)\.\d+\.", "", path)


def _with_lora(name: str, bits: int | None) -> str:
    """What mlx-lm's own LoRA does with its own choice of modules."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model: Any = build(name, bits)
    try:
        model.freeze()
        linear_to_lora_layers(model, LAYERS, {"rank": 2, "scale": 2.0, "dropout": 0.0})
        losses = _train(model)
    except Exception as error:
        return _told(error)
    return "trains" if losses[-1] < losses[0] else f"the losses are {losses}"


def _update_at_random(model: Any) -> None:
    for _, layer in dora_layers(model):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        layer.m = 1.1 * layer.m


def _logits(model: Any) -> mx.array:
    """Of a prompt and, from the cache, of one token after it."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    parts = [model(part, cache=cache) for part in (TOKENS[:, :-1], TOKENS[:, -1:])]
    logits = mx.concatenate(parts, axis=1)[..., :VOCABULARY]
    mx.eval(logits)
    return logits


def _off(found: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest logit."""
    difference = mx.abs(found - expected).max().item()
    return float(difference) / float(mx.abs(expected).max().item())  # pyright: ignore[reportArgumentType]


def _told(error: Exception) -> str:
    first = " ".join(str(error).split()).split(". ")[0]
    return f"{type(error).__name__}: {first.rstrip('.')[:120]}"


def _train(model: Any) -> list[float]:
    def loss(model: Any, tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    model.train()
    step = nn.value_and_grad(model, loss)
    optimizer = optim.Adam(learning_rate=3e-3)
    losses = []
    for _ in range(4):
        value, grads = step(model, TOKENS)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses
