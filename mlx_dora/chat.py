"""``python -m mlx_dora.chat``."""

from mlx_dora.cli.chat import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.chat")
