"""Measures the kernels at the shapes of a model, before a training has to."""

from pathlib import Path

import mlx.core as mx

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.surgery import apply_dora
from mlx_dora.kernels.choice import choices
from mlx_dora.kernels.dispatch import chosen_mode
from mlx_dora.kernels.kept import Choices
from mlx_dora.kernels.measure import decide
from mlx_dora.layers.calls import inference_cases, training_cases


def measure_model(model: str | Path, rank: int, tokens: int) -> Choices:
    """Choose the kernels of a model, where this device has no choice yet.

    Args:
        model: A model folder or a Hub id; every layer of it is adapted.
        rank: Rank of the adapter.
        tokens: Tokens of a batch, rows times length.

    Returns:
        The choices of this model's calls, by case. Empty if nothing is to be chosen, as
        on a CPU.

    Raises:
        DoRAError: If the model does not exist or cannot be adapted.
    """
    if chosen_mode() != "auto":
        return {}
    loaded = load_lazily(model)
    apply_dora(loaded, DoRAConfig(rank=rank, num_layers=-1))
    cases = training_cases(loaded, [tokens])
    cases += inference_cases(loaded, (1, tokens))
    del loaded
    mx.clear_cache()
    decide(cases)
    known = choices()
    points = {point.text for case in cases for point in case.points()}
    return {text: known[text] for text in sorted(points)}


def model_rows(choices: Choices) -> list[tuple[str, str]]:
    """Return a row per kind of call: what is used, and the times of both sides."""
    rows = []
    for text, choice in choices.items():
        used = "kernel" if choice.takes_kernel else "plain MLX"
        times = choice.problem or (
            f"kernel {choice.kernel_us or 0:.0f} us, plain MLX "
            f"{choice.plain_us or 0:.0f} us"
        )
        rows.append((used, f"{text}: {times}"))
    return rows or [("none", "nothing is to be chosen on this device")]
