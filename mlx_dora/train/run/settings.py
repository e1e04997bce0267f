"""Settings that must not change when a run is resumed, and their comparison."""

import hashlib
import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.data.batches import Examples
from mlx_dora.errors import DoRAError
from mlx_dora.options import names_with
from mlx_dora.train.config import TrainConfig
from mlx_dora.train.run.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_TO_ROUNDING = ("processes", "shard")
"""Settings that change the order in which numbers are added, and dropout's masks."""


def run_settings(
    train: TrainConfig, dora: DoRAConfig, base: str, data: Examples, processes: int
) -> dict[str, Any]:
    """Collect the settings that a resumed run must share, as JSON values.

    `base` is the fingerprint of the base model. `processes` is the number of processes
    that share a batch, which affects rounding and dropout.
    """
    names = names_with(train, "may_change", False)
    settings = {
        **{name: getattr(train, name) for name in names},
        **{f"adapter.{name}": value for name, value in asdict(dora).items()},
        "base model": base,
        "training data": digest(data),
        "processes": processes,
        "mlx": version("mlx"),
    }
    return json.loads(json.dumps(settings))


def digest(data: Examples) -> str:
    """Hash the tokens and targets of all examples, in order."""
    total = hashlib.sha256()
    for index in range(len(data)):
        tokens, targets = data[index]
        total.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        total.update(json.dumps(targets).encode())
    return f"sha256:{total.hexdigest()}"


def check_settings(
    checkpoint: Checkpoint, settings: dict[str, Any], *, force: bool
) -> None:
    """Refuse to resume with settings that differ from those of the checkpoint.

    Raises:
        DoRAError: If settings differ and `force` is not set; lists the differences.
    """
    before = checkpoint.state.settings
    changed = [
        name
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if not changed:
        return
    listed = "; ".join(
        f"{name} was {_short(before.get(name))}, is {_short(settings.get(name))}"
        for name in changed
    )
    if set(changed) <= {*_TO_ROUNDING}:
        logger.warning(
            "%s: the result equals that of the old settings up to rounding, not bit "
            "for bit%s",
            listed,
            "; dropout draws other masks" if settings.get("adapter.dropout") else "",
        )
        return
    if not force:
        raise DoRAError(
            f"{checkpoint.path} belongs to a training with other settings: {listed}. "
            "Use the old settings, or continue with the new settings (--force)."
        )
    logger.warning("continuing with changed settings: %s", listed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
