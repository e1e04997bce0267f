"""``python -m mlx_dora.extract``."""

from mlx_dora.cli.extract import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.extract")
