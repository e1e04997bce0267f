"""Settings of the demo. Imports no MLX: the command's options are made from them."""

from dataclasses import dataclass, field
from pathlib import Path

from mlx_dora.errors import DoRAError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo may be asked to do differently."""

    output: Path | None = field(
        default=None,
        metadata={"help": "Folder to make for data, adapter and fused model; a fresh "
                  "mlx_dora_demo here if not given."},
    )  # fmt: skip
    model: str | None = field(
        default=None,
        metadata={
            "help": "Another model (folder or Hub id) in place of SmolLM2-135M.",
            "path": "or id",
        },
    )
    iters: int = field(default=40, metadata={"help": "Training steps, of 4 rows each."})
    seed: int = field(default=0, metadata={"help": "Seed of adapter and data order."})

    def __post_init__(self) -> None:
        for name, least in (("iters", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise DoRAError(
                    f"{name} must be a whole number of at least {least}, got {value!r}."
                )
