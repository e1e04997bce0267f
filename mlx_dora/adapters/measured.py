"""Chooses the kernels of an adapted model that is to generate."""

import mlx.nn as nn

from mlx_dora.kernels.measure import decide
from mlx_dora.layers.calls import inference_cases

# A token of decoding, and prompts up to the chunk that mlx-lm computes at a time.
_TOKENS = (1, 64, 128, 256, 512, 1024, 2048)


def measure_inference(model: nn.Module) -> None:
    """Measure kernels against plain MLX where this device has no choice yet.

    This takes seconds the first time and nothing afterward; on a CPU it does nothing.

    Args:
        model: An adapted model; its weights are not read.
    """
    decide(inference_cases(model, _TOKENS))
