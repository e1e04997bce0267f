"""What TRL's trainers compute, in a process of their own: ``trl_peer.py JOB FOLDER``.

Reads ``job.json`` there and writes ``out.safetensors``: for each loss its value, its
metrics and its gradient with respect to each tensor of the adapter. Imports neither mlx
nor mlx_dora, so that the interpreter may be another one.
"""
# pyright: reportMissingImports=false
# torch, peft and trl are no dependencies of the project.
# pyright: reportAttributeAccessIssue=false

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

Found = dict[str, torch.Tensor]


def arguments(kind: Any, out: Path, rows: int, **settings: Any) -> Any:
    return kind(
        output_dir=str(out),
        per_device_train_batch_size=rows,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        **settings,
    )


def adapted(job: dict[str, Any]) -> Any:
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)


def record(found: Found, name: str, trainer: Any, loss: torch.Tensor) -> None:
    """Note a loss and the gradient of the adapter."""
    trainer.model.zero_grad()
    loss.backward()
    found[f"{name}/loss"] = loss.detach().reshape(1).clone()
    for path, parameter in trainer.model.named_parameters():
        if parameter.grad is not None and ".ref." not in path:
            found[f"{name}/gradient/{path}"] = parameter.grad.clone()


def note_metrics(found: Found, name: str, metrics: dict[str, Any]) -> None:
    for key, value in metrics.items():
        last = value[-1] if isinstance(value, list) else value
        found[f"{name}/metric/{key}"] = torch.tensor([float(last)])


def preferences(trainer: Any) -> dict[str, Any]:
    """The whole data set as one batch, and no copy of the adapter as the reference."""
    model = trainer.model
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
        model.set_adapter("default")
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    model.train()
    return trainer.data_collator(rows)


def dpo(job: dict[str, Any], out: Path, found: Found) -> None:
    settings = arguments(DPOConfig, out, len(job["pairs"]), beta=job["beta"])
    trainer = DPOTrainer(
        adapted(job),
        args=settings,
        train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    batch = preferences(trainer)
    found["dpo/tokens"], found["dpo/mask"] = (
        batch["input_ids"],
        batch["completion_mask"],
    )
    trainer.label_smoothing = job["label_smoothing"]
    for name, case in job["dpo"].items():
        trainer.loss_types, trainer.loss_weights = [case["loss_type"]], [1.0]
        trainer.f_divergence_type = case.get("f_divergence_type", "reverse_kl")
        trainer.f_alpha_divergence_coef = case.get("f_alpha_divergence_coef", 0.5)
        trainer.ld_alpha = case.get("ld_alpha")
        loss = trainer._compute_loss(trainer.model, batch, False)
        record(found, f"dpo/{name}", trainer, loss)
        note_metrics(found, f"dpo/{name}", trainer._metrics["train"])


def kto(job: dict[str, Any], out: Path, found: Found) -> None:
    for name in job["kto"]:
        settings = arguments(
            KTOConfig,
            out,
            len(job["labeled"]),
            beta=job["beta"],
            loss_type=name,
            desirable_weight=1.3,
            undesirable_weight=0.8,
        )
        trainer = KTOTrainer(
            adapted(job),
            args=settings,
            train_dataset=Dataset.from_list(job["labeled"]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )
        batch = preferences(trainer)
        found["kto/tokens"] = batch["input_ids"]
        loss = trainer._compute_loss(trainer.model, batch, False)
        record(found, f"kto/{name}", trainer, loss)
        note_metrics(found, f"kto/{name}", trainer._metrics["train"])


def halves(found: Found) -> dict[str, Any]:
    """DPO's batch in the form of ORPO's and CPO's trainers."""
    tokens, mask = found["dpo/tokens"], found["dpo/mask"]
    attention = found["dpo/attention"]
    count, batch = len(tokens) // 2, {}
    for name, part in (("chosen", slice(count)), ("rejected", slice(count, None))):
        batch[f"{name}_input_ids"] = tokens[part]
        batch[f"{name}_attention_mask"] = attention[part]
        batch[f"{name}_labels"] = tokens[part].masked_fill(mask[part] == 0, -100)
    return batch


def without_reference(job: dict[str, Any], out: Path, found: Found) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    count = len(job["pairs"])
    own = {"loss_type": "simpo", "label_smoothing": job["label_smoothing"]}
    kinds = {
        "orpo": (ORPOTrainer, ORPOConfig, {}),
        "simpo": (CPOTrainer, CPOConfig, own),
        "simpo alone": (CPOTrainer, CPOConfig, {**own, "cpo_alpha": 0.0}),
    }
    for name, (trainer_kind, kind, settings) in kinds.items():
        trainer = trainer_kind(
            model=adapted(job),
            args=arguments(kind, out, count, beta=job["beta"], **settings),
            train_dataset=Dataset.from_list(job["pairs"]),
            processing_class=tokenizer,
        )
        trainer.model.train()
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, halves(found))
        record(found, name, trainer, loss)
        note_metrics(found, name, metrics)


def main() -> None:
    folder = Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    found: Found = {}
    if sys.argv[1] == "pairs":
        dpo(job, folder, found)
        lengths = torch.tensor(job["lengths"])[:, None]
        steps = torch.arange(found["dpo/tokens"].shape[1])[None]
        found["dpo/attention"] = (steps < lengths).long()
        without_reference(job, folder, found)
    else:
        kto(job, folder, found)
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "out.safetensors")


if __name__ == "__main__":
    main()
