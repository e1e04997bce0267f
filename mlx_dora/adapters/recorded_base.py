"""The base model that an adapter folder records, for callers who name none."""

from pathlib import Path

from mlx_dora.adapters.files import read_adapter
from mlx_dora.errors import DoRAError


def recorded_base(adapter_path: str | Path) -> str:
    """Return the path or Hub id of the base that an adapter folder records.

    Raises:
        DoRAError: If the folder is no adapter, it records no base, or it records a
            local folder that is not there.
    """
    name = read_adapter(adapter_path).base.model
    if name is None:
        raise DoRAError(
            f"{adapter_path} does not say what its base is; give the model (--model)."
        )
    # A Hub id has one slash at most and does not begin with a dot, slash or tilde.
    is_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_local and not Path(name).expanduser().exists():
        raise DoRAError(
            f"{adapter_path} was trained on {name}, which is not there; give the model "
            "(--model)."
        )
    return name
