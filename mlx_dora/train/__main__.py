"""``python -m mlx_dora.train``."""

from mlx_dora.cli.train import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.train")
