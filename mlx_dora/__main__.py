"""``python -m mlx_dora <verb>``."""

from mlx_dora.cli._group import group

if __name__ == "__main__":
    group(prog_name="mlx_dora")
