"""A two-block model small enough to differentiate by hand, in float64."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tests.checks import to_numpy

WIDTH, VOCABULARY = 32, 11
PATHS = ("model.layers.0.proj", "model.layers.1.proj")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        return x + mx.tanh(self.proj(x))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [Block(), Block()]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Toy(nn.Module):
    """Each token's logits depend only on that token."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Trunk()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers  # pyright: ignore[reportReturnType]

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(self.model(tokens))


def make_toy(bits: int | None = None) -> Toy:
    mx.random.seed(0)
    model = Toy()
    if bits is not None:
        nn.quantize(
            model,
            group_size=32,
            bits=bits,
            class_predicate=lambda path, _: path in PATHS,
        )
    mx.eval(model.parameters())
    return model


def gradients(
    model: Toy, weights: Sequence[np.ndarray], tokens: Sequence[int], first: int
) -> tuple[np.ndarray, list[list[list[np.ndarray]]]]:
    """For each target: the labels' probabilities, and ∂log p(label)/∂W of both blocks.

    Args:
        model: For its embedding, biases and head.
        weights: W of both blocks as they act.
        tokens: A row.
        first: Position of the first target.

    Returns:
        Probabilities ``(places, labels)``, and the gradients by place, label, block.
    """
    trunk, head = model.model, to_numpy(model.head.weight)
    bias = [
        to_numpy(layer.proj.get("linear", layer.proj)["bias"]) for layer in trunk.layers
    ]
    probabilities, slopes = [], []
    for place in range(first - 1, len(tokens) - 1):
        x0 = to_numpy(trunk.embed.weight)[tokens[place]]
        t0 = np.tanh(weights[0] @ x0 + bias[0])
        x1 = x0 + t0
        t1 = np.tanh(weights[1] @ x1 + bias[1])
        z = head @ (x1 + t1)
        p = np.exp(z - z.max())
        p /= p.sum()
        probabilities.append(p)
        slopes.append([])
        for label in range(VOCABULARY):
            dx = head.T @ (np.eye(VOCABULARY)[label] - p)
            d1 = dx * (1 - t1**2)
            d0 = (dx + weights[1].T @ d1) * (1 - t0**2)
            slopes[-1].append([np.outer(d0, x0), np.outer(d1, x1)])
    return np.array(probabilities), slopes
