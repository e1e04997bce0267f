"""Adapter folders between MLX's format and PEFT's."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import fit_problems
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.peft.reading import from_peft
from mlx_dora.peft.writing import to_peft

AdapterFormat = Literal["mlx", "peft"]


def convert_adapter(
    source: str | Path,
    target: str | Path,
    to: AdapterFormat,
    *,
    model: str | Path | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Convert an adapter folder into the other format.

    Args:
        source: A folder in the format that `to` is not.
        target: The folder to make.
        to: ``"mlx"`` reads PEFT's format and writes MLX's, ``"peft"`` the reverse.
        model: The base, as a local MLX folder or Hub id. With it, modules get the
            names that the other library has for them, and module names,
            ``target_modules`` and shapes are checked.
        base_model: What the output says of its base; the name in `model`, or what
            `source` says, if None.
        overwrite: Replace an existing folder.

    Returns:
        The adapter that was written.

    Raises:
        DoRAError: If `source` cannot be read, holds what the other format cannot
            express, or does not fit the model; or `target` exists.
    """
    inputs = (source, model)
    check_output(target, inputs=inputs, overwrite=overwrite)
    adapter = load_adapter(source) if to == "peft" else None
    loaded = None if model is None else load_lazily(model)
    name = base_model or (None if model is None else str(model))
    if adapter is None:
        adapter = from_peft(source, loaded)
    elif loaded is not None and (
        problems := fit_problems(loaded, adapter, check_base=True)
    ):
        raise DoRAError(f"{source} does not fit the model: {'; '.join(problems)}.")
    recorded = adapter.base.model
    if name is not None:
        adapter = replace(adapter, base=replace(adapter.base, model=name))
    if to == "peft":
        base = recorded if loaded is None else loaded
        to_peft(adapter, target, model=base, inputs=inputs, overwrite=overwrite)
    else:
        save_adapter(adapter, target, inputs=inputs, overwrite=overwrite)
    return adapter
