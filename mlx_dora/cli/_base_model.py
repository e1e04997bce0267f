"""Adds the base model that an adapter records to arguments for mlx-lm's commands."""

from collections.abc import Sequence

import click

from mlx_dora.cli._echo import note

check_base_option = click.option(
    "--check-base/--no-check-base",
    default=True,
    help="Refuse an adapter that was trained on another base or quantization.",
)


def with_recorded_base(
    args: Sequence[str], *, otherwise: str = "Loading the default model of mlx-lm ..."
) -> list[str]:
    """Add ``--model`` to arguments that name an adapter but no model; say what loads.

    Without it, mlx-lm would apply the adapter to its own default model.

    Args:
        args: Arguments of ``mlx_lm.generate`` or ``mlx_lm.chat`` as typed.
        otherwise: What is said if the arguments name neither.

    Raises:
        DoRAError: If the adapter's folder is invalid or records no base.
    """
    adapter, model = value_of(args, "--adapter-path"), value_of(args, "--model")
    if {"-h", "--help"} & set(args):
        return list(args)
    if adapter is None or model is not None:
        note(otherwise if model is None else f"Loading {model} ...")
        return list(args)
    return ["--model", announced_base(adapter), *args]


def announced_base(adapter_path: str) -> str:
    """Return the base that an adapter records, and say so on stderr.

    Raises:
        DoRAError: If the adapter's folder is invalid or records no base.
    """
    from mlx_dora.adapters.recorded_base import recorded_base

    model = recorded_base(adapter_path)
    note(f"Base: {model}, as recorded by the adapter.")
    return model


def value_of(args: Sequence[str], name: str) -> str | None:
    """Return the value of an option among arguments as typed; None without it."""
    for arg, following in zip(args, [*args[1:], None], strict=True):
        if arg == name:
            return following
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
    return None
