"""Make a mixture of experts from a dense Llama by copying its MLPs."""

import json
import shutil
from pathlib import Path

import mlx.core as mx


def upcycle(source: Path, folder: Path, *, experts: int, blocks: int) -> Path:
    """Write a Mixtral whose experts are a Llama's MLPs with a little noise added.

    Args:
        source: Folder of a float Llama with a tied head and a fast tokenizer.
        folder: Folder to write.
        experts: Number of experts; a random router chooses two of them for each token.
        blocks: Number of blocks to use, counted from the first.
    """
    folder.mkdir()
    mx.random.seed(0)
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, mx.array] = {}
    for shard in sorted(source.glob("model*.safetensors")):
        tensors |= mx.load(str(shard))  # pyright: ignore[reportOperatorIssue,reportAssignmentType] - a dict
    made = {
        name: value
        for name, value in tensors.items()
        if ".layers." not in name
        or (int(name.split(".")[2]) < blocks and ".mlp." not in name)
    }
    made["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for i in range(blocks):
        home = f"model.layers.{i}.block_sparse_moe"
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = tensors[f"model.layers.{i}.mlp.{name}.weight"]
            noise = mx.random.normal((experts, *weight.shape)).astype(weight.dtype)
            stack = weight + 0.1 * mx.std(weight) * noise
            made[f"{home}.switch_mlp.{name}.weight"] = stack.astype(weight.dtype)
        router = 0.02 * mx.random.normal((experts, config["hidden_size"]))
        made[f"{home}.gate.weight"] = router.astype(weight.dtype)
    config |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": blocks,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, made, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder
