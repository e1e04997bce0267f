"""What must stay the same for a run to be resumed, and the comparison with now."""

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


def run_settings(
    train: TrainConfig, dora: DoRAConfig, base: str, data: Examples, processes: int
) -> dict[str, Any]:
    """All that must be the same for a run to go on as it was, as JSON gives it back.

    Args:
        train: Settings of the training.
        dora: Settings of the adapter.
        base: Fingerprint of the base model.
        data: The training examples.
        processes: How many share a batch: it changes sums by rounding, and dropout.
    """
    kept = {
        name: getattr(train, name) for name in names_with(train, "may_change", False)
    }
    found = {
        **kept,
        **{f"adapter.{name}": value for name, value in asdict(dora).items()},
        "base model": base,
        "training data": digest(data),
        "processes": processes,
        "mlx": version("mlx"),
    }
    return json.loads(json.dumps(found))


def digest(data: Examples) -> str:
    """Hash of every example's tokens and targets, in order."""
    total = hashlib.sha256()
    for index in range(len(data)):
        tokens, targets = data[index]
        total.update(np.array([len(tokens), *tokens], np.int64).tobytes())
        total.update(json.dumps(targets).encode())
    return f"sha256:{total.hexdigest()}"


def check_settings(
    checkpoint: Checkpoint, settings: dict[str, Any], *, force: bool
) -> None:
    """Refuse to go on with other settings than those of the checkpoint.

    Args:
        checkpoint: Where the run stands.
        settings: Those of now, from `run_settings`.
        force: Go on all the same, with a warning.

    Raises:
        DoRAError: Listing every difference.
    """
    before = checkpoint.state.settings
    differences = [
        f"{name} was {_short(before.get(name))}, is {_short(settings.get(name))}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if not differences:
        return
    listed = "; ".join(differences)
    if not force:
        raise DoRAError(
            f"{checkpoint.path} is of another training: {listed}. Give the old "
            "settings, or force (--force) to go on with the new ones."
        )
    logger.warning("going on with other settings than before: %s", listed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
