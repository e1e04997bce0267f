"""``python -m mlx_dora.merge``."""

from mlx_dora.cli.merge import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.merge")
