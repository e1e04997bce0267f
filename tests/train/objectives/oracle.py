"""The losses of preferences in float64 NumPy, and a small adapted model."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dora.layers import DoRALinear

Array = np.ndarray
BETA, SMOOTHING, TAU, GAMMA = 0.3, 0.1, 0.05, 0.7


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0, -x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def by_rank(values: Array, others: Array) -> Array:
    """Each value minus the other of its rank."""
    ranks = [(values < value).sum() for value in values]
    return values - np.sort(others)[ranks]


def derivative(kind: str, ratio: Array, alpha: float) -> Array:
    """f'(t) of an f-divergence, for log t."""
    t = np.exp(ratio)
    return {
        "reverse_kl": ratio,
        "forward_kl": 1 - 1 / t,
        "js_divergence": np.log(2 * t / (t + 1)),
        "alpha_divergence": ratio
        if alpha == 1
        else (t ** (alpha - 1) - 1) / (alpha - 1),
    }[kind]


def dpo(
    name: str,
    c: Array,
    r: Array,
    count_c: Array,
    count_r: Array,
    entropy: float,
    reference: Any = 0.0,
    kind: str = "reverse_kl",
    alpha: float = 0.5,
) -> Array:
    """Loss of each pair, from log-ratios, token counts and the reference's odds."""
    score_c, score_r = (derivative(kind, ratio, alpha) for ratio in (c, r))
    x, b, e = BETA * (score_c - score_r), BETA, SMOOTHING
    mean = score_c / count_c - score_r / count_r
    share = sigmoid(x / TAU)

    def smoothed(delta: Array) -> Array:
        right, wrong = log_sigmoid(b * delta), log_sigmoid(-b * delta)
        return -(1 - e) * right - e * wrong

    q, p = np.array([sigmoid(x), sigmoid(-x)]), np.array([[1 - e], [e]])
    formulas: dict[str, Callable[[], Array]] = {
        "sigmoid": lambda: -log_sigmoid(x),
        "hinge": lambda: np.maximum(1 - x, 0),
        "ipo": lambda: (mean - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: (q * np.log(q / p)).sum(0),  # KL(q || p)
        "nca_pair": lambda: (
            -log_sigmoid(b * c) - 0.5 * log_sigmoid(-b * c) - 0.5 * log_sigmoid(-b * r)
        ),
        "robust": lambda: (
            (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)
        ),
        "bco_pair": lambda: -log_sigmoid(b * c) - log_sigmoid(-b * r),
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed(by_rank(c - r + reference, reference)),
        "aot_unpaired": lambda: smoothed(by_rank(c, r)),
        "apo_zero": lambda: 1 - sigmoid(b * c) + sigmoid(b * r),
        "apo_down": lambda: sigmoid(b * c) + 1 - sigmoid(x),
        "discopop": lambda: -log_sigmoid(x) * (1 - share) + np.exp(-x) * share,
        "sft": lambda: np.full_like(c, entropy),
        "sigmoid_norm": lambda: -log_sigmoid(b * mean),
    }
    return formulas[name]()


def kto(name: str, ratio: Array, desirable: Array, kl: float) -> Array:
    good, bad = 1.3, 0.8  # the weights
    if name == "kto":
        losses = 1 - sigmoid(BETA * (ratio - kl)), 1 - sigmoid(BETA * (kl - ratio))
    else:
        losses = 1 - sigmoid(BETA * ratio), sigmoid(BETA * ratio)
    return np.where(desirable, good * losses[0], bad * losses[1])


def odds_ratio(c: Array, r: Array) -> Array:
    return c - np.log1p(-np.exp(c)) - r + np.log1p(-np.exp(r))


def slope(function: Callable[[Array], float], at: Array, step: float = 1e-6) -> Array:
    """Gradient by central differences."""
    found = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        moved = [at.copy(), at.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        found[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return found


VOCABULARY, WIDTH, RANK, SCALE = 40, 6, 2, 1.5


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layers: list[Any] = [nn.Linear(WIDTH, WIDTH)]

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.layers[0](self.table(tokens))


class Model(nn.Module):
    """A trunk of one adapted linear layer, and a head."""

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        mx.random.seed(seed)
        self.model = Trunk()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.model.table.weight = mx.random.normal((VOCABULARY, WIDTH))
        self.freeze()
        layer = DoRALinear.from_base(self.model.layers[0], r=RANK, scale=SCALE)
        layer.lora_b = 0.2 * mx.random.normal((RANK, WIDTH))
        layer.m = layer.m * (1 + 0.1 * mx.random.normal((WIDTH,)))
        self.model.layers[0] = layer
        mx.eval(self.parameters())
        self.train()

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.head(self.model(tokens, cache))


class Twin:
    """`Model` in float64, whose norms are constants as in DoRA's backward pass."""

    def __init__(self, model: Model) -> None:
        layer: Any = model.model.layers[0]
        read = [model.model.table.weight, layer.linear.weight, layer.linear.bias]
        read += [model.head.weight]
        self.table, self.weight, self.bias, self.head = (as64(v) for v in read)
        self.adapter = {n: as64(layer[n]) for n in ("lora_a", "lora_b", "m")}
        self.norm = np.linalg.norm(self.weight + self._delta(self.adapter), axis=1)

    @staticmethod
    def _delta(adapter: dict[str, Array]) -> Array:
        return SCALE * (adapter["lora_a"] @ adapter["lora_b"]).T

    def each(
        self, tokens: Array, adapter: dict[str, Array] | None, first: int = 1
    ) -> Array:
        """Log-probability of each token from the second on; None: of the base."""
        weight = self.weight
        if adapter is not None:
            gain = adapter["m"] / self.norm
            weight = gain[:, None] * (weight + self._delta(adapter))
        logits = (self.table[tokens[:, :-1]] @ weight.T + self.bias) @ self.head.T
        logits -= logits.max(-1, keepdims=True)
        found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(found, tokens[:, 1:, None], -1)[..., 0]


def as64(value: Any) -> Array:
    return np.array(value).astype(np.float64)
