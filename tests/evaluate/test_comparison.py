import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, load
from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.surgery import FineTuneType, apply_layers
from mlx_dora.evaluate.comparison import compare_models
from mlx_dora.evaluate.config import EvaluateConfig
from tests.cli.training_data import write_data


@pytest.mark.parametrize("kind", ["dora", "lora", "full"])
def test_every_kind_of_adapter_is_compared_with_its_base(
    tiny_model_folder: Path, tmp_path: Path, kind: FineTuneType
) -> None:
    model, _ = load(tiny_model_folder)
    base = BaseModel(fingerprint=fingerprint(model))
    apply_layers(model, DoRAConfig(rank=2, num_layers=-1), kind)
    changed = [
        (name, value + 0.02)
        for name, value in tree_flatten(model.trainable_parameters())
        if isinstance(value, mx.array)
    ]
    model.load_weights(changed, strict=False)
    adapter = tmp_path / "adapter"
    write_adapter_files(model, adapter, fine_tune_type=kind, base=base)
    config = EvaluateConfig(
        model=str(tiny_model_folder),
        adapter_path=str(adapter),
        data=str(write_data(tmp_path / "data", test=4)),
        max_tokens=3,
    )
    seen: list[tuple[str, int, int]] = []
    comparison = compare_models(config, lambda *event: seen.append(event))
    before, after = comparison.results
    assert (before.name, after.name, comparison.split) == ("base", "adapter", "test")
    assert before.loss.loss != pytest.approx(after.loss.loss, rel=1e-4)
    assert ("base: loss", 4, 4) in seen
    assert ("adapter: labels", 4, 4) in seen
    values = json.loads(json.dumps(comparison.to_dict()))
    assert values["results"][1]["loss"]["perplexity"] == after.loss.perplexity
    assert len(values["prompts"]) == 3
