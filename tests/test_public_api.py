"""The names and signatures that outside code is written against."""

import importlib
import inspect
import subprocess
import sys

import pytest

import mlx_dora

NAMES = {
    "mlx_dora": [
        "Adapter",
        "DoRAConfig",
        "DoRADecomposition",
        "DoRAEmbedding",
        "DoRAError",
        "DoRALinear",
        "DoRAMultiLinear",
        "DoRASwitchLinear",
        "NamedAdapters",
        "PreferenceConfig",
        "RewardConfig",
        "TrainConfig",
        "analyze_adapter",
        "analyze_finetune",
        "apply_dora",
        "compare_adapters",
        "disabled",
        "dora_decompose",
        "dora_merge",
        "extract_adapter",
        "finetune",
        "from_peft",
        "fuse_dora",
        "fuse_model",
        "load",
        "load_adapter",
        "load_datasets",
        "merge_adapters",
        "merge_models",
        "plan_memory",
        "remove_dora",
        "save_adapter",
        "to_peft",
        "use_in_mlx_lm",
    ],
    "mlx_dora.adapters": [
        "Adapter",
        "DoRAConfig",
        "NamedAdapters",
        "apply_dora",
        "disabled",
        "load",
        "load_adapter",
        "remove_dora",
        "save_adapter",
        "use_in_mlx_lm",
    ],
    "mlx_dora.evaluate": [
        "Comparison",
        "EvaluateConfig",
        "LossResult",
        "TaskTable",
        "compare_models",
        "evaluate_loss",
        "evaluate_tasks",
        "label_accuracy",
        "loss_fn",
        "verify_fused",
    ],
    "mlx_dora.doctor": ["Diagnosis", "diagnose"],
    "mlx_dora.demo": ["DemoConfig", "DemoReport", "run_demo"],
    "mlx_dora.publish": [
        "adapter_card",
        "check_upload",
        "fused_card",
        "upload_folder",
    ],
    "mlx_dora.io": [
        "Checkpoint",
        "ShardWriter",
        "TensorStream",
        "atomic_directory",
        "read_header",
        "read_tensors",
        "write_tensors",
        "write_text",
    ],
    "mlx_dora.peft": ["convert_adapter", "from_peft", "to_peft"],
    "mlx_dora.export": [
        "GGUFAdapter",
        "GGUFModel",
        "LoRAConversion",
        "convert_to_gguf",
        "convert_to_lora",
        "fused_to_gguf",
        "to_gguf",
        "to_lora",
    ],
    "mlx_dora.merge": [
        "MergeChoice",
        "choose_merge",
        "estimate_fisher",
        "merge_adapters",
        "merge_models",
    ],
    "mlx_dora.analyze": [
        "DoRADecomposition",
        "analyze_adapter",
        "analyze_finetune",
        "compare_adapters",
    ],
    "mlx_dora.train": [
        "PreferenceConfig",
        "RewardConfig",
        "StepReport",
        "TrainConfig",
        "TrainReport",
        "finetune",
        "plan_memory",
    ],
    "mlx_dora.data": [
        "Batch",
        "DataConfig",
        "Dataset",
        "Example",
        "RowCounts",
        "Schedule",
        "TokenDataset",
        "as_dataset",
        "batches_once",
        "load_datasets",
        "pack_batch",
        "pad_batch",
        "target_spans",
    ],
    "mlx_dora.serve": ["NotServedError", "ServedPaths", "check_request"],
    "mlx_dora.kernels": [
        "QuantizedWeight",
        "adapted_norm",
        "dora_scale",
        "fused_weight",
        "normalize_rows",
    ],
}

# In order; "*" starts those given by name only, "=" marks a default.
SIGNATURES = {
    "mlx_dora.dora_decompose": ["W", "eps="],
    "mlx_dora.dora_merge": ["W0", "delta_m", "delta_V"],
    "mlx_dora.apply_dora": ["model", "config"],
    "mlx_dora.remove_dora": ["model"],
    "mlx_dora.disabled": ["model"],
    "mlx_dora.fuse_dora": ["model", "dequantize="],
    "mlx_dora.load_adapter": ["path"],
    "mlx_dora.save_adapter": [
        "model_or_adapter",
        "path",
        "*",
        "overwrite=",
        "base_model=",
        "inputs=",
    ],
    "mlx_dora.to_peft": [
        "adapter",
        "path",
        "*",
        "base_model_name_or_path=",
        "model=",
        "overwrite=",
        "inputs=",
    ],
    "mlx_dora.from_peft": ["path", "model="],
    "mlx_dora.DoRALinear.from_base": ["module", "r=", "dropout=", "scale="],
    "mlx_dora.DoRAEmbedding.from_base": ["module", "r=", "dropout=", "scale="],
    "mlx_dora.DoRALinear.fuse": ["self", "dequantize="],
    "mlx_dora.DoRAEmbedding.fuse": ["self", "dequantize="],
    "mlx_dora.kernels.adapted_norm": [
        "weight",
        "lora_a",
        "lora_b",
        "scale",
        "*",
        "squared_base=",
    ],
    "mlx_dora.kernels.dora_scale": [
        "y",
        "h",
        "lora_b",
        "scale",
        "m",
        "norm",
        "bias=",
    ],
    "mlx_dora.kernels.fused_weight": ["weight", "lora_a", "lora_b", "scale", "m"],
    "mlx_dora.kernels.normalize_rows": ["weight", "magnitude="],
    "mlx_dora.merge.merge_adapters": [
        "adapters",
        "*",
        "model",
        "method=",
        "weights=",
        "rank=",
        "save_path=",
        "overwrite=",
        "check_base=",
        "density=",
        "seed=",
        "scale=",
        "parameters=",
        "space=",
        "magnitudes=",
        "calibrate=",
        "fisher=",
    ],
    "mlx_dora.merge.merge_models": [
        "models",
        "*",
        "save_path",
        "base=",
        "method=",
        "weights=",
        "parameters=",
        "dtype=",
        "fisher=",
        "overwrite=",
    ],
    "mlx_dora.merge.estimate_fisher": [
        "model",
        "data",
        "*",
        "paths=",
        "config=",
        "progress=",
    ],
    "mlx_dora.analyze.analyze_adapter": [
        "adapter",
        "model=",
        "*",
        "check_base=",
        "progress=",
    ],
    "mlx_dora.analyze.analyze_finetune": [
        "base",
        "tuned",
        "*",
        "spectrum=",
        "progress=",
    ],
    "mlx_dora.analyze.compare_adapters": [
        "adapters",
        "model=",
        "*",
        "activations=",
        "check_base=",
        "progress=",
    ],
    "mlx_dora.train.finetune": [
        "model",
        "tokenizer",
        "train_set",
        "valid_set",
        "*",
        "train",
        "dora",
        "adapter_path",
        "callback=",
        "progress=",
        "loss=",
        "batches=",
        *("preference=", "reward=", "objective="),
    ],
    "mlx_dora.train.plan_memory": [
        *("train", "dora", "*", "limit=", "lengths=", "device="),
        *("preference=", "reward=", "objective=", "processes="),
    ],
}

PACKAGES = ("kernels", "train", "adapters", "peft", "merge", "analyze")


def describe(function: object) -> list[str]:
    assert callable(function)
    told = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in told:
            told.append("*")
        has_default = parameter.default is not parameter.empty
        told.append(parameter.name + ("=" if has_default else ""))
    return told


def find(path: str) -> object:
    parts = path.split(".")
    cut = next(i for i, part in enumerate(parts[1:], 1) if part not in PACKAGES)
    found: object = importlib.import_module(".".join(parts[:cut]))
    for part in parts[cut:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("module", NAMES)
def test_public_names(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == NAMES[module]
    assert set(NAMES[module]) <= set(dir(loaded))
    for name in NAMES[module]:
        assert getattr(loaded, name) is not None


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path: str) -> None:
    assert describe(find(path)) == SIGNATURES[path]


def test_load_takes_a_model_and_an_adapter() -> None:
    assert describe(mlx_dora.load)[:2] == ["model", "adapter_path="]


def test_dora_config_fields() -> None:
    from dataclasses import fields

    defaults = {field.name: field.default for field in fields(mlx_dora.DoRAConfig)}
    expected = {
        "rank": 8,
        "scale": 20.0,
        "dropout": 0.0,
        "keys": None,
        "num_layers": 16,
        "variant": "dora",
        "rank_pattern": None,
        "use_rslora": False,
        "init": "lora",
        "magnitude_keys": None,
        "aux_width": 1,
    }
    assert defaults == expected


def test_public_things_are_documented() -> None:
    undocumented = [
        f"{module}.{name}"
        for module, names in NAMES.items()
        for name in names
        if not inspect.getdoc(getattr(importlib.import_module(module), name))
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    "module",
    [
        "mlx_dora",
        "mlx_dora.errors",
        "mlx_dora.openblas",
        "mlx_dora.train",
        "mlx_dora.merge",
        "mlx_dora.analyze",
        "mlx_dora.adapters.config",
    ],
)
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module};"
        "heavy = {'mlx_lm', 'click', 'transformers', 'torch'};"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dora_decomposes'"):
        mlx_dora.__getattr__("dora_decomposes")


def test_version_is_the_installed_one() -> None:
    from importlib import metadata

    try:
        installed = metadata.version("mlx_dora")
    except metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert mlx_dora.__version__ == installed
