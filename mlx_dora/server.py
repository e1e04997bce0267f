"""``python -m mlx_dora.server``."""

from mlx_dora.cli.server import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.server")
