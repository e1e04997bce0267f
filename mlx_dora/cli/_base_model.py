"""Adding the base that an adapter records to the arguments of mlx-lm's commands."""

from collections.abc import Sequence

import click


def with_recorded_base(args: Sequence[str]) -> list[str]:
    """Return the arguments with ``--model``, where they name an adapter alone.

    mlx-lm would put the adapter onto a default model of its own, which it hardly fits.

    Args:
        args: Arguments of ``mlx_lm.generate`` or ``mlx_lm.chat`` as typed.

    Raises:
        DoRAError: If the adapter's folder is unfit or records no base.
    """
    adapter = _value(args, "--adapter-path")
    if adapter is None or _value(args, "--model") is not None:
        return list(args)
    from mlx_dora.adapters.recorded_base import recorded_base

    model = recorded_base(adapter)
    click.echo(f"Base: {model}, as the adapter records.", err=True)
    return ["--model", model, *args]


def _value(args: Sequence[str], name: str) -> str | None:
    for arg, following in zip(args, [*args[1:], None], strict=True):
        if arg == name:
            return following
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None
