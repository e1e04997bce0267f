"""What PEFT and torch do, in a process of their own: ``peft_peer.py JOB FOLDER``.

Reads ``job.json`` and ``in.safetensors`` there and writes ``out.safetensors``. Imports
neither mlx nor mlx_dora, so that the interpreter may be another one.
"""
# pyright: reportMissingImports=false
# torch and peft belong to the extra `peers`, which few machines install.

# Where PEFT is not installed, pyright takes tests/peft for it.
# pyright: reportAttributeAccessIssue=false

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def load_base(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def make(job: dict[str, Any], given: Tensors) -> Tensors:
    """Save random models of configurations, as transformers writes them."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    for name, settings in job["configs"].items():
        torch.manual_seed(0)
        settings = dict(settings)
        config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        model = AutoModelForCausalLM.from_config(config).float()
        model.save_pretrained(Path(job["out"]) / name)
    return given


def linears(job: dict[str, Any], given: Tensors) -> Tensors:
    """Write the paths of the linear layers of classes, layers' numbers left out."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, settings in job["classes"].items():
        found[name] = sorted(
            {
                re.sub(r"\.\d+(?=\.|$)", ".#", path)
                for path, module in on_meta(settings).named_modules()
                if isinstance(module, torch.nn.Linear | Conv1D)
                or "Linear" in type(module).__name__  # grouped ones of latent attention
            }
        )
    Path(job["out"]).write_text(json.dumps(found))
    return given


def on_meta(settings: dict[str, Any]) -> Any:
    """A class with these settings and transformers' defaults, without memory."""
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    settings = dict(settings)
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:  # it has no class for the language model alone
            return AutoModelForImageTextToText.from_config(config)


def shapes(job: dict[str, Any], given: Tensors) -> Tensors:
    """Write the shape (out, in) of every linear layer of classes, by path."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, settings in job["classes"].items():
        found[name] = {}
        for path, module in on_meta(settings).named_modules():
            if isinstance(module, Conv1D):
                found[name][path] = tuple(module.weight.shape[::-1])
            elif type(module) is torch.nn.Linear:
                found[name][path] = tuple(module.weight.shape)
    Path(job["out"]).write_text(json.dumps(found))
    return given


def load_each(job: dict[str, Any], given: Tensors) -> Tensors:
    """Load a folder into each class; write the error, if any, and a count."""
    found = {}
    for name, settings in job["classes"].items():
        model = on_meta(settings)
        folder = Path(job["adapters"]) / name
        stored = load_file(folder / "adapter_model.safetensors")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys.*")
                adapted = PeftModel.from_pretrained(
                    model, folder, low_cpu_mem_usage=True
                )
        except Exception as error:  # what the test is about: PEFT refuses the folder
            found[name] = [f"{type(error).__name__}: {error}"[:500], 0]
            continue
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        differ = {k for k in expected.keys() & stored.keys()
                  if expected[k].shape != stored[k].shape}  # fmt: skip
        differ |= expected.keys() ^ stored.keys()
        found[name] = ["differ: " + ", ".join(sorted(differ))[:400] if differ else "",
                       len(stored)]  # fmt: skip
    Path(job["out"]).write_text(json.dumps(found))
    return given


def logits(job: dict[str, Any], given: Tensors) -> Tensors:
    """Logits of a saved adapter; a warning, as of a missing key, is an error."""
    base = load_base(job["model"])
    with torch.no_grad(), warnings.catch_warnings():
        plain = base(given["tokens"]).logits
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, job["adapter"]).eval()
        return {"base": plain, "adapted": model(given["tokens"]).logits}


def train(job: dict[str, Any], given: Tensors) -> Tensors:
    """Train an adapter for a few steps, save it, and give its logits."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(job["model"]), LoraConfig(**job["config"]))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["learning_rate"])
    tokens = given["tokens"]
    for _ in range(job["steps"]):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(job["adapter"])
    with torch.no_grad(), model.disable_adapter():
        plain = model(tokens).logits
    with torch.no_grad():
        return {"base": plain, "adapted": model(tokens).logits}


def layer(job: dict[str, Any], given: Tensors) -> Tensors:
    """Forward and gradients of one linear layer under PEFT's DoRA."""
    width, rows = given["weight"].shape[1], given["weight"].shape[0]
    base = torch.nn.Sequential(torch.nn.Linear(width, rows, bias="bias" in given))
    base[0].weight.data = given["weight"]
    if "bias" in given:
        base[0].bias.data = given["bias"]
    config = LoraConfig(
        r=job["r"], lora_alpha=job["alpha"], use_dora=True, target_modules=["0"]
    )
    adapted = get_peft_model(base, config).base_model.model[0]
    parameters = {
        "lora_a": adapted.lora_A["default"].weight,
        "lora_b": adapted.lora_B["default"].weight,
        "m": adapted.lora_magnitude_vector["default"].weight,
    }
    for name, parameter in parameters.items():
        parameter.data = given[name].contiguous()
    x = given["x"].requires_grad_()
    y = adapted(x)
    y.backward(given["dy"])
    found = {name: parameter.grad for name, parameter in parameters.items()}
    return {"y": y.detach(), "x": x.grad, **found}


def combine(job: dict[str, Any], given: Tensors) -> Tensors:
    """Merge saved adapters by `add_weighted_adapter` and save the result."""
    torch.manual_seed(0)
    names = [str(i) for i, _ in enumerate(job["adapters"])]
    model = PeftModel.from_pretrained(
        load_base(job["model"]), job["adapters"][0], adapter_name=names[0]
    )
    for name, path in zip(names[1:], job["adapters"][1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.add_weighted_adapter(adapters=names, adapter_name="merged", **job["settings"])
    out = Path(job["out"])
    model.save_pretrained(out, selected_adapters=["merged"])
    for file in (out / "merged").iterdir():
        file.rename(out / file.name)
    return given


def main() -> None:
    folder = Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    jobs = {
        "make": make,
        "linears": linears,
        "shapes": shapes,
        "load_each": load_each,
        "logits": logits,
        "train": train,
        "layer": layer,
        "combine": combine,
    }
    found = jobs[sys.argv[1]](job, load_file(folder / "in.safetensors"))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "out.safetensors")


if __name__ == "__main__":
    main()
