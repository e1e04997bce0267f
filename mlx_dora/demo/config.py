"""Settings of the demo. Imports no MLX: the command's options are made from them."""

from dataclasses import dataclass
from pathlib import Path

from mlx_dora.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo may be asked to do differently."""

    output: Path | None = option(
        None,
        help="Folder to make for data, adapter and fused model; a fresh "
        "mlx_dora_demo here if not given.",
    )
    model: str | None = option(
        None,
        help="Another model (folder or Hub id) in place of SmolLM2-135M.",
        path="or id",
    )
    iters: int = option(40, help="Training steps, of 4 rows each.", least=1)
    seed: int = option(0, help="Seed of adapter and data order.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
