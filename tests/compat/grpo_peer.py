"""What TRL's GRPO computes, in a process of its own: ``grpo_peer.py loss FOLDER``.

Reads ``job.json`` and ``in.safetensors`` there and writes ``out.safetensors``. Imports
neither mlx nor mlx_dora, so that the interpreter may be another one.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# torch, peft and trl belong to the extra `peers`, which few machines install.

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def make_trainer(job: dict[str, Any], folder: Path) -> Any:
    """TRL's trainer of an adapted model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    settings = GRPOConfig(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=job["max_completion_length"],
        temperature=job["temperature"],
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0 for _ in completions],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def loss(job: dict[str, Any], given: Tensors, folder: Path) -> Tensors:
    """Loss and gradients of each case, and log-probabilities of the batch."""
    trainer = make_trainer(job, folder)
    model = trainer.model.train()
    length = given["completion_ids"].shape[1]
    row = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    with torch.no_grad(), model.disable_adapter():
        reference, *_ = trainer._get_per_token_logps_and_entropies(
            model, row, mask, length
        )
    with torch.no_grad():
        own, *_ = trainer._get_per_token_logps_and_entropies(model, row, mask, length)
    found = {"logps": own, "reference": reference}
    old, other = own + given.pop("old"), own + given.pop("reference")
    for number, case in enumerate(job["cases"]):
        trainer.loss_type = case["loss_type"]
        trainer.beta = case.get("beta", 0.0)
        trainer.epsilon_low = case.get("epsilon", 0.2)
        trainer.epsilon_high = case.get("epsilon_high", trainer.epsilon_low)
        trainer.importance_sampling_level = case.get(
            "importance_sampling_level", "token"
        )
        trainer.args.delta = case.get("delta")
        trainer.args.use_bias_correction_kl = case.get("use_bias_correction_kl", True)
        inputs = {
            **given,
            "ref_per_token_logps": other,
            "old_per_token_logps": old if case["is_later"] else None,
            "num_items_in_batch": given["completion_mask"].sum(),
        }
        model.zero_grad()
        value = trainer._compute_loss(model, inputs)
        value.backward()
        found[f"{number}.loss"] = value.detach()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found[f"{number}.{name}"] = parameter.grad.clone()
    return found


def main() -> None:
    folder = Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    found = loss(job, load_file(folder / "in.safetensors"), folder)
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "out.safetensors")


if __name__ == "__main__":
    main()
