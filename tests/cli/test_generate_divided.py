"""``mlx_dora.generate`` in processes that divide the model between them."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, load
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.adapters.surgery import apply_layers
from tests.processes import run
from tests.train import ring
from tests.train.test_tensor import WIDE


def adapter_of(folder: Path, path: Path, kind: str) -> None:
    """Write an adapter whose values change the model's choice of words."""
    model, _ = load(folder)
    apply_layers(model, DoRAConfig(rank=4, scale=4.0, num_layers=-1), kind)  # pyright: ignore[reportArgumentType]
    mx.random.seed(5)
    flat = tree_flatten(model.trainable_parameters())
    model.load_weights(
        [(n, v * 1.3 + 0.1 * mx.random.normal(v.shape)) for n, v in flat],  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue] - arrays
        strict=False,
    )
    write_adapter_files(model, path, fine_tune_type=kind)  # pyright: ignore[reportArgumentType]


def generated(
    work: Path, arguments: list[str], processes: int
) -> list[tuple[str, str]]:
    words = ["-m", "mlx_dora", "generate", *arguments]
    if processes == 1:
        done = run(words, check=True)
        return [(done.stdout, done.stderr)]
    with ring.started(work, *[words] * processes) as started:
        return [process.communicate(timeout=120) for process in started]


def text_of(output: str) -> str:
    return output.split("==========")[1]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("dora", 4), pytest.param("lora", None, marks=pytest.mark.slow)],
)
def test_two_processes_write_the_text_of_one(
    make_tiny_folder: Callable[..., Path], tmp_path: Path, kind: str, bits: int | None
) -> None:
    folder = make_tiny_folder(bits=bits, **WIDE)
    adapter_of(folder, tmp_path / "adapter", kind)
    plain = [*("--model", str(folder), "--prompt", "the cat", "--max-tokens", "12")]
    adapted = [*plain, "--adapter-path", str(tmp_path / "adapter")]
    (alone, _), *_ = generated(tmp_path, adapted, 1)
    (first, errors), (second, others) = generated(tmp_path, adapted, 2)
    assert "Traceback" not in errors + others, errors + others
    assert first, errors + others
    assert text_of(first) == text_of(alone), errors
    assert second == ""
    assert text_of(alone) != text_of(generated(tmp_path, plain, 1)[0][0])


def test_what_processes_cannot_divide_is_refused_by_name(
    make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_folder(num_key_value_heads=1)
    arguments = ["--model", str(folder), "--prompt", "the cat", "--max-tokens", "4"]
    for _, errors in generated(tmp_path, arguments, 2):
        last = errors.splitlines()[-1]
        assert last.startswith("Error: shard tensor cannot divide this model (llama): ")
        assert "self_attn.n_kv_heads is 1, which 2 does not divide" in last
