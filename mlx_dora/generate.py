"""``python -m mlx_dora.generate``."""

from mlx_dora.cli.generate import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.generate")
