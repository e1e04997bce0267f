"""``python -m mlx_dora.doctor``."""

from mlx_dora.cli.doctor import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.doctor")
