"""The same model and step in torch and PEFT: LoRA and DoRA, on the same card.

    python benchmarks/gpu/peft_steps.py --ranks 8 64 384 --output results.jsonl

All in bfloat16, and with float32 adapters under autocast. Needs torch, transformers and
peft; `--tiny` runs on a CPU.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _turns
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from _shapes import SHAPE

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
WARMUPS, STEPS = 4, 16


def base_model(device: str, shape: dict[str, int]) -> Any:
    """Return a random Llama in bfloat16."""
    facts: dict[str, Any] = {
        **shape,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**facts))
    return model.to(device, torch.bfloat16)


def step_of(
    base: Any, kind: str, rank: int, is_float32: bool, tokens: Any
) -> Callable[[], float]:
    """Adapt the base, and return its training step."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=TARGETS,
        lora_dropout=0.0,
        use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=is_float32)
    model.train()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.01)
    trained = [value for value in model.parameters() if value.requires_grad]
    device = tokens.device.type
    extra = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-5, **extra)

    def step() -> float:
        cast = torch.autocast(device, dtype=torch.bfloat16)
        with cast if is_float32 else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def measure(step: Callable[[], float], is_cuda: bool) -> dict[str, Any]:
    """Return times, memory beyond what is alive, and the last loss of a step."""

    def synchronize() -> None:
        if is_cuda:
            torch.cuda.synchronize()

    for _ in range(WARMUPS):
        step()
    times, loss = [], float("nan")
    for _ in range(STEPS):
        synchronize()
        began = time.perf_counter()
        loss = step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    extra = None
    if is_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        alive = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        extra = (torch.cuda.max_memory_allocated() - alive) / 2**20
    return {"ms": statistics.median(times), "extra_mib": extra, "loss": loss}


def main() -> None:
    """Measure every kind, rank and precision."""
    parser = argparse.ArgumentParser(description="PEFT's LoRA and DoRA")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 384])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    is_cuda = torch.cuda.is_available() and not options.tiny
    device = "cuda" if is_cuda else "cpu"
    shape = TINY if options.tiny else SHAPE
    torch.set_float32_matmul_precision("high")
    base = base_model(device, shape)
    length = 16 if options.tiny else 512
    tokens = torch.randint(0, shape["vocab_size"], (4, length), device=device)
    versions = {"torch": torch.__version__, "peft": peft.__version__}
    card = torch.cuda.get_device_name() if is_cuda else "CPU"
    _turns.ready()
    with options.output.open("a") as file:
        for is_float32 in (False, True):
            for rank in options.ranks:
                lora = None
                for kind in ("lora", "dora"):
                    step = step_of(base, kind, rank, is_float32, tokens)
                    found = measure(step, is_cuda)
                    lora = lora or found["ms"]
                    line = {
                        "what": "step",
                        "kind": f"peft {kind}",
                        "rank": rank,
                        "adapter": "float32" if is_float32 else "bfloat16",
                        "over_lora": found["ms"] / lora,
                        "card": card,
                        **versions,
                        **found,
                    }
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    print(json.dumps(line), flush=True)
                    del step
                    base = base_model(device, shape)
    _turns.done()


if __name__ == "__main__":
    main()
