"""Runs a command of mlx-lm with mlx_dora's layers."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dora.cli._base_model import value_of
from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign

if TYPE_CHECKING:
    import mlx.core as mx

# An error raised in these packages concerns the user's model, adapter or arguments. An
# error raised in our own layers is our bug and keeps its traceback.
_HOSTS = ("mlx_lm", "transformers", "huggingface_hub", "tokenizers", "mlx.nn")


def _raised_by_host(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return any(module == host or module.startswith(f"{host}.") for host in _HOSTS)


_PATHS = ("--model", "--adapter-path", "--draft-model", "--prompt-cache-file")


def _with_home(args: list[str]) -> list[str]:
    """Return the arguments with ``~`` expanded where mlx-lm expects a path."""
    expanded = []
    for before, arg in zip(["", *args], args, strict=False):
        flag, equals, value = arg.partition("=")
        if before in _PATHS:
            arg = os.path.expanduser(arg)  # noqa: PTH111 - must not change a Hub id
        elif flag in _PATHS and equals:
            arg = f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111
        expanded.append(arg)
    return expanded


def _is_unexpected(error: BaseException) -> bool:
    return not isinstance(error, ValueError | KeyError) and _raised_by_host(error)


def _check_inputs(args: list[str]) -> None:
    """Check the headers of a local model and adapter before MLX reads them."""
    from mlx_dora.adapters.files import read_adapter
    from mlx_dora.adapters.hosting import model_folder

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--model")
    parser.add_argument("--adapter-path")
    with contextlib.suppress(argparse.ArgumentError, SystemExit):
        known, _ = parser.parse_known_args(args)
        if known.model is not None and Path(known.model).is_dir():
            model_folder(known.model)
        if known.adapter_path is not None and Path(known.adapter_path).is_dir():
            read_adapter(known.adapter_path)


def _processes(
    stack: contextlib.ExitStack, args: list[str]
) -> "mx.distributed.Group | None":
    """Return the processes of ``mlx.launch``, None for one; silence all but one."""
    import mlx.core as mx

    group = mx.distributed.init()
    if group.size() == 1:
        return None
    if "-" in (value_of(args, "--prompt"), value_of(args, "-p")):
        raise DoRAError(
            "give the text as --prompt TEXT: only the first of several processes has "
            "the standard input."
        )
    if group.rank():
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    return group


def run_host_command(
    name: str,
    command_path: str,
    args: list[str],
    main: Callable[[], None] | None = None,
    *,
    is_divided: bool = False,
) -> None:
    """Call ``mlx_lm.<name>.main()`` with `args` as the command line.

    Args:
        name: The module of mlx_lm that holds the command.
        command_path: Name of the program in mlx-lm's usage text.
        args: The arguments as typed, including ``--help``.
        main: Function to call instead of mlx-lm's.
        is_divided: Let the processes of ``mlx.launch`` divide the model between them.
            Only the first prints.

    Raises:
        DoRAError: If mlx-lm refuses the model, the adapter or an argument's value.
    """
    from huggingface_hub.errors import HFValidationError

    from mlx_dora.adapters.hosting import Hosting

    previous = sys.argv
    sys.argv = [command_path, *_with_home(args)]
    try:
        _check_inputs(args)
        what = f"the input of mlx_lm.{name}"
        with contextlib.ExitStack() as stack:
            group = _processes(stack, args) if is_divided else None
            stack.enter_context(Hosting(group))
            stack.enter_context(foreign(what, by=_is_unexpected))
            (main or import_module(f"mlx_lm.{name}").main)()
    except DoRAError:
        raise
    except HFValidationError as error:  # a missing path, treated as a Hub id
        raise DoRAError(f"there is no such folder, and as a Hub id: {error}") from error
    except (ValueError, KeyError) as error:
        if not _raised_by_host(error):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        line = " ".join(str(text).split())
        raise DoRAError(f"mlx-lm: {line}") from error
    finally:
        sys.argv = previous
