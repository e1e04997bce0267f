"""Finds the kernels without a gradient that mlx-lm's models reach in training on Metal.

Run ``python -m tests.compat.gpu_branches [MODEL ...]`` on a machine without a GPU. It
prints a JSON object. ``without_gradient`` has, for each model, the kernels of
``mx.fast.metal_kernel`` that its backward pass needs the gradient of, which MLX cannot
compute. ``gated_delta`` has the models with gated delta nets, and whether they decay by
one number per head (``head``) or one for each number of a key (``key``).

Before mlx-lm is imported, MLX is made to look as on a Mac: Metal is available, and the
default device is a GPU. A kernel is replaced by zeros of its output's shape, with a
gradient that notes the kernel's name. A kernel with a gradient of its own, from
`mx.custom_function`, is called but never noted.
"""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from mlx_dora import openblas

openblas.preload()

import mlx.core as mx  # noqa: E402 - after the BLAS
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

called: set[str] = set()
asked: set[str] = set()  # for a gradient
decays: set[str] = set()  # of gated delta nets


def imitate_metal() -> None:
    """Make MLX look as on a Mac, with kernels that only note their use."""
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.gpu
    mx.fast.metal_kernel = noting_kernel


def noting_kernel(name: str, *_: Any, **__: Any) -> Callable[..., Any]:
    """A kernel that returns zeros and notes its calls."""

    def call(
        *,
        inputs: list[Any],
        output_shapes: list[Any],
        output_dtypes: list[mx.Dtype],
        **_: Any,
    ) -> Any:
        called.add(name)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]

        @mx.custom_function
        def run(*arrays: mx.array) -> Any:
            kinds = zip(output_shapes, output_dtypes, strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in kinds]

        @run.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            asked.add(name)
            return tuple(mx.zeros_like(primal) for primal in primals)

        outputs: Any = run(*arrays)
        return list(outputs)

    return call


def note_decays() -> None:
    """Note the decays of gated delta nets that train."""
    from mlx_lm.models import gated_delta

    plain = gated_delta.gated_delta_ops

    def noting(q: Any, k: Any, v: Any, g: mx.array, *rest: Any) -> Any:
        decays.add("head" if g.ndim == 3 else "key")
        return plain(q, k, v, g, *rest)

    gated_delta.gated_delta_ops = noting


def without_gradient(name: str) -> list[str]:
    """The kernels that training a model calls, and cannot differentiate."""
    from tests.compat.tiny_models import build
    from tests.compat.tiny_sizes import VOCABULARY

    called.clear()
    asked.clear()
    decays.clear()
    tokens = mx.array(
        [[(5 * i + 3 * j) % VOCABULARY for j in range(12)] for i in (0, 1)]
    )
    try:
        model: Any = build(name)
        flat: Any = tree_flatten(model.parameters())
        floats = {k: v for k, v in flat if mx.issubdtype(v.dtype, mx.floating)}

        def loss(values: dict[str, mx.array]) -> mx.array:
            model.update(tree_unflatten(list(values.items())))
            return model(tokens).astype(mx.float32).square().mean()

        model.train()
        mx.grad(loss)(floats)
    # Whatever mlx-lm's code raises: then it is not known which gradients it needs.
    except Exception:
        return sorted(called)
    return sorted(asked)


def main(names: list[str]) -> None:
    imitate_metal()
    from tests.compat.tiny_models import model_files

    note_decays()
    logging.disable(logging.WARNING)
    found, delta = {}, {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name in names or [n for n, is_model in model_files().items() if is_model]:
            if kernels := without_gradient(name):
                found[name] = kernels
            if decays:
                (delta[name],) = decays
    sys.stdout.write(json.dumps({"without_gradient": found, "gated_delta": delta}))


if __name__ == "__main__":
    main(sys.argv[1:])
