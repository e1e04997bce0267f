"""The directional merges on dense weights, in float64, from the definitions."""

from collections.abc import Iterable

import numpy as np


def total(values: Iterable[np.ndarray]) -> np.ndarray:
    """Sum of several arrays."""
    return np.sum(list(values), axis=0)


def split(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length and unit direction of each row; a zero row has none."""
    norm = np.linalg.norm(weight, axis=1, keepdims=True)
    return norm, weight / np.where(norm > 0, norm, 1.0)


def dense_slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    (norm_a, u), (norm_b, v) = split(a), split(b)
    theta = np.arccos(np.clip((u * v).sum(1, keepdims=True), -1, 1))
    mixed = (np.sin((1 - t) * theta) * u + np.sin(t * theta) * v) / np.sin(theta)
    return ((1 - t) * norm_a + t * norm_b) * mixed


def dense_nmean(weights: list[np.ndarray], shares: list[float]) -> np.ndarray:
    parts = [split(weight) for weight in weights]
    mean = total(w * u for w, (_, u) in zip(shares, parts, strict=True))
    length = total(w * n for w, (n, _) in zip(shares, parts, strict=True))
    return length * mean / np.linalg.norm(mean, axis=1, keepdims=True)


def dense_karcher(weights: list[np.ndarray], shares: list[float]) -> np.ndarray:
    """Row by row, with vectors; 300 steps are far more than it needs."""
    parts = [split(weight) for weight in weights]
    length = total(w * n for w, (n, _) in zip(shares, parts, strict=True))
    rows = []
    for j in range(len(weights[0])):
        units = [u[j] for _, u in parts]
        mean = total(w * u for w, u in zip(shares, units, strict=True))
        mean = mean / np.linalg.norm(mean)
        for _ in range(300):
            tangent = np.zeros_like(mean)
            for w, u in zip(shares, units, strict=True):
                theta = np.arccos(np.clip(u @ mean, -1, 1))
                if np.sin(theta) > 1e-12:
                    tangent += w * theta / np.sin(theta) * (u - np.cos(theta) * mean)
            size = np.linalg.norm(tangent)
            if size < 1e-14:
                break
            mean = np.cos(size) * mean + np.sin(size) * tangent / size
            mean /= np.linalg.norm(mean)
        rows.append(mean)
    return length * np.array(rows)


def dense_magnitude_weighted(
    weights: list[np.ndarray], base: np.ndarray, shares: list[float]
) -> np.ndarray:
    base_norm = np.linalg.norm(base, axis=1, keepdims=True)
    parts = [split(weight) for weight in weights]
    moved = [w * np.abs(n - base_norm) for w, (n, _) in zip(shares, parts, strict=True)]
    moved = [change / total(moved) for change in moved]
    mean = total(w * u for w, (_, u) in zip(moved, parts, strict=True))
    length = total(w * n for w, (n, _) in zip(moved, parts, strict=True))
    return length * mean / np.linalg.norm(mean, axis=1, keepdims=True)
