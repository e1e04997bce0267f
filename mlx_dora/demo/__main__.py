"""``python -m mlx_dora.demo``."""

from mlx_dora.cli.demo import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.demo")
