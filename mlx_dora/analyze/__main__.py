"""``python -m mlx_dora.analyze``."""

from mlx_dora.cli.analyze import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.analyze")
