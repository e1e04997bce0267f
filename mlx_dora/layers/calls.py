"""Lists the calls of the ops that an adapted model makes, to measure them before."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn

from mlx_dora.kernels.case import DORA_SCALE, Case
from mlx_dora.kernels.choice import recorded_cases
from mlx_dora.kernels.dispatch import chosen_mode


def training_cases(model: nn.Module, tokens: Iterable[int]) -> list[Case]:
    """Return the calls of training steps and validations of these sizes.

    Args:
        model: An adapted model that accepts tokens ``(rows, length)``.
        tokens: Numbers of tokens of the batches, rows times length.

    Returns:
        One case per kind of call. Empty if no choice is to be made, as on a CPU.
    """
    cases = _for_tokens(_token_cases(model), tokens)
    return [*dict.fromkeys([*cases, *map(_without_gradients, cases)])]


def inference_cases(model: nn.Module, tokens: Iterable[int]) -> list[Case]:
    """Return the calls of forward passes of these sizes; see `training_cases`.

    Norms are not among them: they are computed once per adapter, in float32.
    """
    cases = _for_tokens(_token_cases(model), tokens)
    scales = [_without_gradients(case) for case in cases if case.op == DORA_SCALE]
    return [*dict.fromkeys(scales)]


def _token_cases(model: nn.Module) -> list[Case]:
    """Return the calls for a single token, from a graph that is not evaluated."""
    if chosen_mode() != "auto":
        return []
    was_training = model.training
    high, low = mx.random.state[0].tolist()  # pyright: ignore[reportIndexIssue] - a list
    try:
        model.train()
        with recorded_cases() as cases:
            model(mx.array([[0]]))
    finally:
        model.train(was_training)
        mx.random.seed(high << 32 | low)  # the key of MLX's generator, unchanged
    return [*dict.fromkeys(cases)]


def _for_tokens(cases: list[Case], tokens: Iterable[int]) -> list[Case]:
    sizes = sorted(set(tokens))
    return [*dict.fromkeys(case.for_tokens(size) for case in cases for size in sizes)]


def _without_gradients(case: Case) -> Case:
    return case._replace(has_gradients=False)
