"""Reports what a training needs besides MLX: disk, the Hub's token, other packages."""

import shutil
from pathlib import Path

from mlx_dora.doctor.machine import installed_version

_OPTIONAL = {
    "matplotlib": "loss.png",
    "datasets": "data sets on the Hub",
    "wandb": "--report-to wandb",
    "swanlab": "--report-to swanlab",
}
"""Packages that mlx_dora uses if they are installed, and what for."""


def disk_rows() -> list[tuple[str, str]]:
    """Return the free space of the working folder and of the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"working folder": Path.cwd(), "Hub cache": Path(HF_HUB_CACHE)}
    return [(name, f"{_free(place)} free") for name, place in places.items()]


def _free(place: Path) -> str:
    while not place.exists():
        place = place.parent
    return f"{shutil.disk_usage(place).free / 1e9:.1f} GB"


def hub_row() -> tuple[str, str]:
    """Return whether a token of the Hugging Face Hub is stored; asks no server."""
    from huggingface_hub import get_token

    if get_token():
        return "Hub login", "a token is stored"
    return "Hub login", "none (only uploads and gated models need it: hf auth login)"


def optional_rows() -> list[tuple[str, str]]:
    """Return the versions of optional packages, or how to install them."""
    rows = []
    for name, use in _OPTIONAL.items():
        version = installed_version(name)
        rows.append((name, version or f"not installed (for {use}): pip install {name}"))
    return rows
