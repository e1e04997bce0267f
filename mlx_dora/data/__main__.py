"""``python -m mlx_dora.data``."""

from mlx_dora.cli.data import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.data")
