"""Colorblind readers can tell the colors of a chart apart.

Differences are ΔE' of CAM02-UCS (Luo et al. 2006; sRGB's viewing conditions) after the
simulation of Machado et al. 2009 at severity 1, which works in linear RGB.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import mlx_dora.page

CSS = Path(mlx_dora.page.__file__).with_name("page.css").read_text("utf-8")
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
CAT02 = np.array([[0.7328, 0.4296, -0.1624], [-0.7036, 1.6975, 0.0061],
                  [0.0030, 0.0136, 0.9834]])  # fmt: skip
CONES = np.array([[0.38971, 0.68898, -0.07868], [-0.22981, 1.18340, 0.04641],
                  [0, 0, 1]]) @ np.linalg.inv(CAT02)  # fmt: skip


def linear(colors: list[str]) -> np.ndarray:
    """Return hexadecimal sRGB colors as linear RGB, shape ``(n, 3)``."""
    s = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    return np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)


def cam02_ucs(rgb: np.ndarray) -> np.ndarray:
    """Return J', a', b' of linear RGB: white D65, adapting 64/5π cd/m², Yb = 20."""
    adapting, n = 64 / np.pi / 5, 0.2
    k = 1 / (5 * adapting + 1)
    level = k**4 * adapting + 0.1 * (1 - k**4) ** 2 * np.cbrt(5 * adapting)
    degree = 1 - np.exp((-adapting - 42) / 92) / 3.6
    white = 100 * XYZ.sum(1)
    gain = degree * 100 / (CAT02 @ white) + 1 - degree
    scale = 0.725 * n**-0.2

    def response(xyz: np.ndarray) -> np.ndarray:
        cones = (xyz @ CAT02.T * gain) @ CONES.T
        power = (level * np.abs(cones) / 100) ** 0.42
        return np.sign(cones) * 400 * power / (power + 27.13) + 0.1

    def achromatic(r: np.ndarray, g: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (2 * r + g + b / 20 - 0.305) * scale

    r, g, b = response(100 * np.clip(rgb, 0, 1) @ XYZ.T).T
    red, yellow = r - 12 * g / 11 + b / 11, (r + g - 2 * b) / 9
    hue = np.arctan2(yellow, red)
    ratio = achromatic(r, g, b) / achromatic(*response(white))
    lightness = 100 * ratio ** (0.69 * (1.48 + np.sqrt(n)))
    eccentric = 12500 / 13 * scale * (np.cos(hue + 2) + 3.8)
    chroma = (eccentric * np.hypot(red, yellow) / (r + g + 21 * b / 20)) ** 0.9
    chroma *= np.sqrt(lightness / 100) * (1.64 - 0.29**n) ** 0.73
    colorful = np.log1p(0.0228 * chroma * level**0.25) / 0.0228
    own = 1.7 * lightness / (1 + 0.007 * lightness)
    return np.stack([own, colorful * np.cos(hue), colorful * np.sin(hue)], -1)


def least_difference(colors: list[str], vision: str) -> float:
    """Return the least ΔE' between any two colors, as a reader sees them."""
    seen = cam02_ucs(linear(colors) @ VISION[vision].T)
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    return float(apart[np.triu_indices(len(colors), 1)].min())


def palette(scheme: str) -> tuple[list[str], str]:
    """Return the colors of series and the background of cards."""
    block = CSS.split(":root{")[1 if scheme == "light" else 2]
    card = re.search(r"--card:(#\w+)", block)
    assert card is not None
    short = card[1] if len(card[1]) == 7 else "#" + "".join(2 * c for c in card[1][1:])
    return re.findall(r"--c\d:(#\w{6})", block), short


def test_the_measure_knows_white_and_published_faults() -> None:
    white = cam02_ucs(linear(["#ffffff"]))[0]
    np.testing.assert_allclose(white, [100, 0, 0], atol=2)
    # The palette before: measured as 2.3 and 4.3 with another implementation.
    former = [
        "#2a6fbb",
        "#d1700c",
        "#2b8a5f",
        "#b0407a",
        "#7a5cc4",
        "#8a7412",
        "#25899c",
    ]
    assert least_difference(former, "deuteranopia") == pytest.approx(2.3, abs=0.1)
    assert least_difference(former, "protanopia") == pytest.approx(4.3, abs=0.15)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_any_two_colors_differ(scheme: str, vision: str) -> None:
    colors, _ = palette(scheme)
    assert len(colors) == 10
    assert least_difference(colors, vision) >= 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_color_stands_out_from_its_card(scheme: str) -> None:
    colors, card = palette(scheme)
    y, back = linear(colors) @ XYZ[1], float((linear([card]) @ XYZ[1])[0])
    contrast = (np.maximum(y, back) + 0.05) / (np.minimum(y, back) + 0.05)
    assert contrast.min() >= 3  # WCAG 2.1, 1.4.11
