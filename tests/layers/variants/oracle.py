"""All variants in float64 NumPy, written from the equations of the papers."""

from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]
Equation = Callable[[Params, np.ndarray, np.ndarray, float, Params], np.ndarray]
"""Adapted weight (out, in) from the trained parameters, W0 (out, in), the constant row
norms (out,), s and the fixed parameters."""


def row_norms(weight: np.ndarray) -> np.ndarray:
    return np.linalg.norm(weight, axis=1)


def update(p: Params) -> np.ndarray:
    return (p["lora_a"] @ p["lora_b"]).T


def made(p: Params) -> np.ndarray:
    """Return the update with the factors from the networks of doran-aux."""
    a = p["lora_a"] @ np.tanh(p["first.a"])
    return (a @ np.tanh(p["first.b"]) @ p["lora_b"]).T


def direction(name: str, p: Params, w: np.ndarray, s: float, fixed: Params):
    """Return the weight whose row norms are the constant norm."""
    if name == "magnitude":
        return w
    if name == "doran-aux":
        return w + s * made(p)
    if name == "edora":
        return w + s * (fixed["lora_a"] @ p["core"] @ fixed["lora_b"]).T
    if name == "adaptive":
        return w + s * (p["lora_a"] * fixed["active"] @ p["lora_b"]).T
    if name == "pissa":
        return w + s * (update(p) - (fixed["start_a"] @ fixed["start_b"]).T)
    return w + s * update(p)


def dora(p, w, norm, s, fixed):
    return (p["m"] / norm)[:, None] * direction("dora", p, w, s, fixed)


def pissa(p, w, norm, s, fixed):
    return (p["m"] / norm)[:, None] * direction("pissa", p, w, s, fixed)


def adaptive(p, w, norm, s, fixed):
    return (p["m"] / norm)[:, None] * direction("adaptive", p, w, s, fixed)


def doran(p, w, norm, s, fixed):
    tau = np.log1p(np.exp(p["t"]))
    return (p["m"] / (norm + tau))[:, None] * direction("doran", p, w, s, fixed)


def doran_aux(p, w, norm, s, fixed):
    tau = np.log1p(np.exp(p["t"]))
    return (p["m"] / (norm + tau))[:, None] * direction("doran-aux", p, w, s, fixed)


def edora(p, w, norm, s, fixed):
    return (p["m"] / norm)[:, None] * direction("edora", p, w, s, fixed)


def map_(p, w, norm, s, fixed):
    ba = update(p)
    first = p["alpha"] * w / (np.linalg.norm(w) + 1e-6)
    return first + s * p["beta"] * ba / (np.linalg.norm(ba) + 1e-6)


def prediag(p, w, norm, s, fixed):
    return p["d"][:, None] * w + s * update(p)


def magnitude(p, w, norm, s, fixed):
    return (p["m"] / norm)[:, None] * w


EQUATIONS: dict[str, Equation] = {
    "adaptive": adaptive,
    "doran": doran,
    "doran-aux": doran_aux,
    "edora": edora,
    "magnitude": magnitude,
    "map": map_,
    "pissa": pissa,
    "prediag": prediag,
}


def numeric_gradients(
    loss: Callable[[Params], float], params: Params, step: float = 1e-5
) -> Params:
    """Return central differences of a float64 function for each parameter."""
    gradients = {}
    for name, value in params.items():
        gradient = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                sides.append(loss({**params, name: moved}))
            gradient[index] = (sides[0] - sides[1]) / (2 * step)
        gradients[name] = gradient
    return gradients
