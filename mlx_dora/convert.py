"""``python -m mlx_dora.convert``."""

from mlx_dora.cli.convert import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.convert")
