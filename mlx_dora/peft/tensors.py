"""The tensors of PEFT's ``adapter_model.safetensors`` under our names."""

import re

import mlx.core as mx

from mlx_dora.adapters.adapter import listed
from mlx_dora.adapters.keys import natural_order

PEFT_TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_LEAVES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
EMBEDDINGS = (
    "PEFT's magnitude runs along the other axis, and its adapter leaves a tied head "
    "alone"
)

# DeepSpeed, accelerate and torch save a model's own state, in which the name of the
# adapter stands before ``weight``; PEFT takes it out.
_LEAF = re.compile(
    r"(?P<path>.+)\.(?:"
    r"(?P<lora_a>lora_A)(?:\.(?P<of_a>[^.]+))?\.weight"
    r"|(?P<lora_b>lora_B)(?:\.(?P<of_b>[^.]+))?\.weight"
    r"|(?P<m>lora_magnitude_vector)(?:\.(?P<of_m>(?!weight$)[^.]+))?(?:\.weight)?)"
)


def peft_name(path: str, leaf: str) -> str:
    """PEFT's name of our tensor `leaf` of the module that PEFT finds at `path`."""
    return f"{PREFIX}{path}.{PEFT_LEAVES[leaf]}"


def our_tensors(raw: dict[str, mx.array]) -> tuple[dict[str, mx.array], list[str]]:
    """Return PEFT's tensors in our names and layout, as float32, and all problems.

    Args:
        raw: The tensors of adapted modules. The name of the adapter in theirs is
            dropped if it is the same in all.

    Returns:
        ``<PEFT's module path>.<lora_a, lora_b or m>`` to arrays, and what is wrong.
    """
    tensors: dict[str, mx.array] = {}
    strange: dict[str, list[str]] = {}
    adapters: set[str] = set()
    for name in sorted(raw, key=natural_order):
        found = _LEAF.fullmatch(name.removeprefix(PREFIX))
        if found is None:
            strange.setdefault(_what_is(name), []).append(name)
            continue
        adapter = found["of_a"] or found["of_b"] or found["of_m"]
        adapters |= {adapter} if adapter else set()
        leaf = next(leaf for leaf in PEFT_LEAVES if found[leaf])
        ours = f"{found['path']}.{leaf}"
        if raw[name].ndim > 2:
            strange.setdefault("convolutions do not convert:", []).append(name)
        elif ours in tensors and len(adapters) < 2:
            strange.setdefault("tensors stored twice:", []).append(name)
        else:
            tensors[ours] = mx.contiguous(raw[name].astype(mx.float32).T)
    problems = [p for what, names in strange.items() for p in listed(what, names)]
    if len(adapters) > 1:
        one = sorted(adapters)[0]
        what = f"it holds {len(adapters)} adapters (save each on its own, with PEFT's "
        what += f"save_pretrained(path, selected_adapters=[{one!r}])):"
        problems += listed(what, sorted(adapters))
    return tensors, problems


def _what_is(name: str) -> str:
    if "lora_embedding_" in name:
        return f"adapters of embeddings do not convert ({EMBEDDINGS}):"
    return "tensors that are not those of a LoRA or DoRA adapter:"
