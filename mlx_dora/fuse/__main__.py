"""``python -m mlx_dora.fuse``."""

from mlx_dora.cli.fuse import command

if __name__ == "__main__":
    command(prog_name="mlx_dora.fuse")
