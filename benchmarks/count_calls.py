"""Count the Python calls and files of three journeys through the package.

    python benchmarks/count_calls.py

- ``merge``: one matrix of a slerp of two adapters: what a merge of two matrices has
  more than a merge of one. ``merge_folders`` is a whole merge of one matrix from two
  folders into a third, with all reading, checking and writing.
- ``layer``: one forward of a `DoRALinear`: ``step`` within a training step, whose norms
  are held; ``alone`` computes them too; ``eval`` has its cache filled.
- ``rank``: files of ``mlx_dora.train --rank`` that hold the rank, as an argument or in
  a config: ``journey``, those that call each other from the command to the layer, and
  ``all``, with those that only check or show it before.

Calls are those of functions in this package as `sys.setprofile` sees them, generator
expressions included. One JSON line.
"""

from mlx_dora import openblas  # isort: skip - loads OpenBLAS, so before mlx

import contextlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ROOT = Path(openblas.__file__).parent
RANK = 37
"""A rank that nothing else in a training equals."""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
}


def counted(
    work: Callable[[], Any], counts: Callable[[FrameType], bool] = lambda _: True
) -> Counter[CodeType]:
    """Run some work and count the calls of the package's functions.

    Args:
        work: What is run.
        counts: Whether a call counts.
    """
    seen: Counter[CodeType] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and counts(frame):
            seen[code] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


def summary(seen: Counter[CodeType]) -> dict[str, Any]:
    """Calls and files of a count."""
    return {"calls": seen.total(), "files": sorted({_file_of(code) for code in seen})}


def _file_of(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(ROOT).as_posix()


def make_model() -> nn.Module:
    """A random Llama of two blocks."""
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    mx.eval(model.parameters())
    return model


def make_adapter(blocks: int, seed: int) -> Any:
    """An adapter of one matrix in each of some blocks."""
    from mlx_dora import Adapter, DoRAConfig

    mx.random.seed(seed)
    tensors: dict[str, mx.array] = {}
    for block in range(blocks):
        path = f"model.layers.{block}.self_attn.q_proj"
        tensors[f"{path}.lora_a"] = mx.random.normal((64, 4))
        tensors[f"{path}.lora_b"] = mx.random.normal((4, 64))
        tensors[f"{path}.m"] = mx.abs(mx.random.normal((64,)))
    paths = tuple(f"model.layers.{block}.self_attn.q_proj" for block in range(blocks))
    return Adapter(
        config=DoRAConfig(rank=4, keys=paths, num_layers=-1), tensors=tensors
    )


def merge_calls() -> dict[str, Any]:
    """One matrix of a merge."""
    from mlx_dora.merge import merge_adapters

    model = make_model()
    merge_adapters([make_adapter(1, 1)] * 2, model=model)  # loads what is loaded once
    found = []
    for blocks in (1, 2):
        pair = [make_adapter(blocks, seed) for seed in (1, 2)]
        found.append(counted(lambda pair=pair: merge_adapters(pair, model=model)))
    return summary(found[1] - found[0])


def count_merge() -> dict[str, Any]:
    """One matrix of a merge, and a whole merge of folders."""
    from mlx_dora import save_adapter
    from mlx_dora.merge import merge_adapters

    model = make_model()
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/a{seed}" for seed in (1, 2)]
        for seed, path in enumerate(paths, 1):
            save_adapter(make_adapter(1, seed), path)
        merge_adapters(paths, model=model, save_path=f"{folder}/warm")
        whole = counted(
            lambda: merge_adapters(paths, model=model, save_path=f"{folder}/out")
        )
    return {"merge": merge_calls(), "merge_folders": summary(whole)}


def forward_calls() -> dict[str, list[tuple[str, str]]]:
    """File and name of every function that a forward of a layer enters.

    Returns:
        By how the forward is made, in the order of the first call.
    """
    from mlx_dora.layers import DoRALinear, held_norms

    layer = DoRALinear.from_base(nn.Linear(64, 32), r=4)
    x = mx.ones((3, 64))

    def calls() -> list[tuple[str, str]]:
        layer(x)
        seen = counted(lambda: layer(x)).elements()
        return [(_file_of(code), code.co_name) for code in seen]

    found = {"alone": calls()}
    with held_norms(layer):
        found["step"] = calls()
    layer.eval()
    return found | {"eval": calls()}


def count_layer() -> dict[str, Any]:
    """A forward of a layer, by how it is made."""
    return {
        how: {"calls": len(calls), "files": sorted({file for file, _ in calls})}
        for how, calls in forward_calls().items()
    }


def count_rank() -> dict[str, list[str]]:
    """Files that hold the rank of a training: on the way to a layer, and in all."""
    from mlx_dora.cli.train import command

    def holds(frame: FrameType) -> bool:
        values = list(frame.f_locals.values())
        values += [v for one in values if isinstance(one, dict) for v in one.values()]
        values += [vars(one).get("rank") for one in values if hasattr(one, "__dict__")]
        return any(type(one) is int and one == RANK for one in values)

    journey: list[str] = []

    def counts(frame: FrameType) -> bool:
        if not holds(frame):
            return False
        if not journey and _file_of(frame.f_code).startswith("layers/"):
            journey.extend(_callers(frame, holds))
        return True

    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        _write_model(model)
        data.mkdir()
        (data / "train.jsonl").write_text('{"text": "the quick brown fox"}\n' * 4)
        args = ["--model", str(model), "--data", str(data), "--rank", str(RANK)]
        args += ["--adapter-path", f"{folder}/out", "--iters", "1", "--batch-size", "1"]
        args += ["--num-layers", "1"]

        def train() -> None:
            with contextlib.redirect_stdout(sys.stderr):
                command.main(args, standalone_mode=False)

        seen = [_file_of(code) for code in counted(train, counts)]
    files = list(dict.fromkeys(seen))  # in the order of the first call
    is_layer = [name.startswith("layers/") for name in files]
    return {"journey": journey, "all": files[: is_layer.index(True) + 1]}


def _callers(frame: FrameType | None, holds: Callable[[FrameType], bool]) -> list[str]:
    """Files of this package on the stack, outermost first, whose function holds it."""
    files: list[str] = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(str(ROOT)) and holds(frame):
            files.append(_file_of(frame.f_code))
        frame = frame.f_back
    return list(dict.fromkeys(reversed(files)))


def _write_model(folder: Path) -> None:
    from mlx.utils import tree_flatten
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    weights = dict(tree_flatten(make_model().parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] - a property in the stubs
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    print(json.dumps({**count_merge(), "layer": count_layer(), "rank": count_rank()}))
