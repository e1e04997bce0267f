"""Settings of the demo."""

from dataclasses import dataclass
from pathlib import Path

from mlx_dora.options import check_options, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo; the defaults are those of the documented run."""

    output: Path | None = option(
        None,
        help="Folder to create for data, adapter and fused model; by default, a new "
        "folder mlx_dora_demo in the working folder.",
    )
    model: str | None = option(
        None,
        help="Model (folder or Hub id) to use instead of SmolLM2-135M.",
        path="or id",
    )
    iters: int = option(40, help="Number of training steps, of 4 rows each.", least=1)
    seed: int = option(0, help="Random seed for adapter and data order.", least=0)

    def __post_init__(self) -> None:
        check_options(self)
