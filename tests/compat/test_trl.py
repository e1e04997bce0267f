"""Losses, rewards and gradients of preferences against TRL's trainers.

Run with ``MLX_DORA_PEERS_PYTHON`` naming an interpreter that has trl 1.16, torch, peft
and transformers.
"""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, apply_dora, load, save_adapter, to_peft
from mlx_dora.data.batches import unit_batch
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import as_dataset
from mlx_dora.train import TrainConfig
from mlx_dora.train.objectives.config import PreferenceConfig
from mlx_dora.train.objectives.dpo_losses import LOSSES, SMOOTHED
from mlx_dora.train.objectives.kto import Kto
from mlx_dora.train.objectives.make import make_objective
from mlx_dora.train.run.start import trainable_tensors
from tests.compat.peer_process import peers_python, run_peer
from tests.hosts import version_in

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

BETA, SMOOTHING = 0.3, 0.1
DPO: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSSES},
    **{
        f"sigmoid {kind}": {"loss_type": "sigmoid", "f_divergence_type": kind}
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "ipo alpha_divergence 0.8": {
        "loss_type": "ipo",
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.8,
    },
    "sigmoid ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.4},
}
VALUES = 1e-5
"""Bound of the losses' relative error."""
GRADIENTS = 1e-4
"""Bound of the gradients' relative error.

With MLX's own cross-entropy on the CPU it was 2.2e-4: see `token_cross_entropy`.
"""
TURNS = [
    ("What is a lock?", "A thing that one thread holds.", "A key."),
    ("Name a color.", "Blue.", "The number seven is not a color at all."),
    ("What does len do?", "It returns the number of items.", "It sorts a list."),
]


def says(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


PAIRS = [
    {"prompt": says(q, "user"), "chosen": says(good), "rejected": says(bad)}
    for q, good, bad in TURNS
]
LABELED = [
    {"prompt": says(q, "user"), "completion": says(a), "label": label}
    for q, good, bad in TURNS
    for a, label in ((good, True), (bad, False))
][:5]


class Rotation(nn.Module):
    """Rotary embedding with exact frequencies.

    MLX computes them in float32, which alone moves a loss by 8e-6 here.
    """

    def __init__(self, dims: int, base: float) -> None:
        super().__init__()
        self.dims = dims
        powers = np.arange(0, dims, 2, dtype=np.float64) / dims
        self._freqs = mx.array((base**powers).astype(np.float32))

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._freqs,
        )


@pytest.fixture(scope="module")
def adapted(
    smollm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, Path]:
    """SmolLM2 with a random adapter, its tokenizer, and the adapter as PEFT's."""
    python = peers_python("torch", "peft", "transformers", "trl")
    assert version_in(python, "trl").startswith("1.16."), "another version of trl"
    folder = tmp_path_factory.mktemp("trl")
    model, tokenizer = load(smollm)
    blocks: Any = model.layers
    for block in blocks:
        rope = block.self_attn.rope
        block.self_attn.rope = Rotation(rope.dims, rope.base)
    keys = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    mx.random.seed(2)
    apply_dora(model, DoRAConfig(rank=4, scale=2.0, keys=keys, num_layers=4))
    flat = trainable_tensors(model).items()
    noise = [(n, v + 0.02 * mx.random.normal(v.shape)) for n, v in flat]
    model.load_weights(noise, strict=False)
    model.train()
    save_adapter(model, folder / "adapter")
    to_peft(folder / "adapter", folder / "peft", base_model_name_or_path=str(smollm))
    return model, tokenizer, folder


def job(smollm: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(smollm),
        "adapter": str(folder / "peft"),
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        **more,
    }


def compare(
    name: str,
    model: nn.Module,
    objective: Any,
    batch: Any,
    found: dict[str, mx.array],
    without: str = "",
) -> None:
    """Compare a loss, its metrics but for one, and the gradient of the adapter."""
    function = nn.value_and_grad(model, objective.loss)
    (loss, _, _, table), gradient = function(model, *batch)
    assert float(loss) == pytest.approx(float(found[f"{name}/loss"][0]), rel=VALUES)
    metrics = objective.values(np.array(table, np.float64).reshape(-1).tolist())
    for key, value in metrics.items():
        if key == without:
            continue
        theirs = float(found[f"{name}/metric/{key}"][0])
        assert value == pytest.approx(theirs, rel=1e-4, abs=1e-4), (name, key)
    difference = total = 0.0
    flat = dict(tree_flatten(gradient))
    of_peer = {k for k in found if k.startswith(f"{name}/gradient/")}
    assert len(flat) == len(of_peer)
    for path, value in flat.items():
        module, _, leaf = path.rpartition(".")
        own = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
        key = f"{name}/gradient/base_model.model.{module}.{own[leaf]}.default.weight"
        theirs = np.array(found[key], np.float64)
        ours = np.array(value, np.float64)
        ours = ours if ours.ndim == 1 else ours.T
        difference += ((ours - theirs.reshape(ours.shape)) ** 2).sum()
        total += (theirs**2).sum()
    assert total > 0, name
    error = float(np.sqrt(difference / total))
    sys.stderr.write(f"{name}: {float(loss):.6f}, gradient {error:.1e}\n")
    assert error < GRADIENTS, name


def make(name: str, **settings: Any) -> Any:
    config = PreferenceConfig(beta=BETA, **settings)
    return make_objective(TrainConfig(objective=name), config)  # pyright: ignore[reportArgumentType]


def test_pairs_train_as_in_trl(adapted: tuple[Any, Any, Path], smollm: Path) -> None:
    model, tokenizer, folder = adapted
    any_dpo = make("dpo")
    data = as_dataset(PAIRS, tokenizer, DataConfig(), "pairs", any_dpo.dataset)
    raw = unit_batch(data, [0, 2, 4], 2, 512)
    order = [0, 2, 4, 1, 3, 5]
    lengths = [len(data[index][0]) for index in order]
    more = {"pairs": PAIRS, "dpo": DPO, "lengths": lengths}
    found = run_peer(
        "trl_peer.py", "pairs", folder / "a", job(smollm, folder, **more), {}
    )

    # The same tokens and the same answers.
    theirs, mask = np.array(found["dpo/tokens"]), np.array(found["dpo/mask"])
    for row, index in enumerate(order):
        tokens, first = data[index]
        assert theirs[row, : len(tokens)].tolist() == tokens
        assert np.flatnonzero(mask[row]).tolist() == [*range(first, len(tokens))]

    for name, case in DPO.items():
        own = {**case, "loss_type": (case["loss_type"],)}
        smoothing = SMOOTHING if case["loss_type"] in SMOOTHED else 0.0
        objective = make("dpo", label_smoothing=smoothing, **own)
        batch = objective.complete(model, data, raw)
        compare(f"dpo/{name}", model, objective, batch, found)
    pair = raw[:2]
    compare("orpo", model, make("orpo"), pair, found)
    compare("simpo", model, make("simpo", label_smoothing=SMOOTHING), pair, found)
    alone = make("simpo", label_smoothing=SMOOTHING, cpo_alpha=0.0)
    # TRL reports 0 for a cross-entropy that does not count; ours is the real figure.
    compare("simpo alone", model, alone, pair, found, without="nll_loss")


def test_labels_train_as_in_trl(adapted: tuple[Any, Any, Path], smollm: Path) -> None:
    model, tokenizer, folder = adapted
    more = {"labeled": LABELED, "kto": [*Kto.loss_types]}
    found = run_peer(
        "trl_peer.py", "kto", folder / "b", job(smollm, folder, **more), {}
    )
    for name in Kto.loss_types:
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
        objective = make("kto", loss_type=(name,), **weights)
        data = as_dataset(LABELED, tokenizer, DataConfig(), "rows", objective.dataset)
        raw = unit_batch(data, [*range(5)], 1, 512)
        batch = objective.complete(model, data, raw)
        compare(f"kto/{name}", model, objective, batch, found)
