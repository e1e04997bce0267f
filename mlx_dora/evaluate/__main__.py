"""``python -m mlx_dora.evaluate``."""

from mlx_dora.cli.evaluate import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.evaluate")
