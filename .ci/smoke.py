"""Smoke test of an installed wheel, run outside the checkout: smoke.py CHECKOUT."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import mlx_dora
from mlx_dora import openblas

openblas.preload()

import mlx.core as mx  # noqa: E402 - OpenBLAS first
import mlx.nn as nn  # noqa: E402

from mlx_dora.kernels import _source, dispatch  # noqa: E402


def main(checkout: Path) -> None:
    """Check where the package is, its names, one layer, and every console script."""
    home = Path(mlx_dora.__file__).parent
    assert checkout not in home.parents, f"{home} is the checkout, not the wheel"
    assert metadata.version("mlx_dora") == mlx_dora.__version__
    for name in mlx_dora.__all__:
        assert getattr(mlx_dora, name) is not None, name

    sources = home / "metal"
    assert _source.source_folder() == sources, _source.source_folder()
    for name in dispatch.KERNELS:
        assert (sources / f"{name}.metal").is_file(), name

    for name in ("page/page.css", "page/page.js", "analyze/report.js"):
        assert (home / name).is_file(), name

    linear = nn.Linear(64, 32)
    layer = mlx_dora.DoRALinear.from_base(linear, r=4)
    x = mx.random.normal((3, 64))
    assert mx.array_equal(layer(x), linear(x)), "an untrained layer is not its base"

    scripts = [
        entry.name
        for entry in metadata.entry_points(group="console_scripts")
        if entry.dist is not None and entry.dist.name.replace("-", "_") == "mlx_dora"
    ]
    declared = tomllib.loads((checkout / "pyproject.toml").read_text())
    assert sorted(scripts) == sorted(declared["project"]["scripts"]), scripts
    for script in scripts:
        done = subprocess.run([script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, f"{script} --help: {done.stderr}"
        assert "usage" in done.stdout.lower(), script
    print(f"{len(scripts)} scripts and {len(mlx_dora.__all__)} names from {home}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
