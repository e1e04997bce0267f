"""Converts adapter folders between MLX's format and PEFT's."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.attach import fit_problems
from mlx_dora.adapters.files import load_adapter, save_adapter
from mlx_dora.adapters.hosting import load_lazily
from mlx_dora.adapters.key_form import with_key_form
from mlx_dora.errors import DoRAError
from mlx_dora.io.atomic import check_output
from mlx_dora.peft.reading import from_peft
from mlx_dora.peft.tensors import PEFT_TENSORS_NAME
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
        source: An adapter folder of either format.
        target: The folder to create.
        to: ``"peft"`` reads MLX's format and writes PEFT's; ``"mlx"`` writes MLX's. An
            adapter that is in MLX's format already is written again in today's form,
            with keys relative to a block where `model` shows that they can be.
        model: The base model, as a local MLX folder or Hub id. Used to translate module
            names to the other library's and to check names, ``target_modules`` and
            shapes.
        base_model: Name of the base model to record in the output. If None, the name in
            `model` or else the name that `source` records.
        overwrite: Replace an existing folder.

    Returns:
        The adapter that was written.

    Raises:
        DoRAError: If `source` cannot be read, contains something that the other format
            cannot express, or does not fit the model; or if `target` exists.
    """
    inputs = (source, model)
    check_output(target, inputs=inputs, overwrite=overwrite)
    is_peft = to == "mlx" and Path(source, PEFT_TENSORS_NAME).exists()
    adapter = None if is_peft else load_adapter(source)
    loaded = None if model is None else load_lazily(model)
    name = base_model or (None if model is None else str(model))
    if adapter is None:
        adapter = from_peft(source, loaded)
    elif loaded is not None:
        if problems := fit_problems(loaded, adapter, check_base=True):
            raise DoRAError(f"{source} does not fit the model: {'; '.join(problems)}.")
        config = with_key_form(adapter.config, loaded, adapter.paths)
        adapter = replace(adapter, config=config)
    recorded = adapter.base.model
    if name is not None:
        adapter = replace(adapter, base=replace(adapter.base, model=name))
    if to == "peft":
        base = recorded if loaded is None else loaded
        to_peft(adapter, target, model=base, inputs=inputs, overwrite=overwrite)
    else:
        save_adapter(adapter, target, inputs=inputs, overwrite=overwrite)
    return adapter
