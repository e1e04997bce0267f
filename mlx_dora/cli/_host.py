"""Running one of mlx-lm's own commands on our layers."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign

# An error raised in here is about the caller's model, adapter or arguments; one raised
# in our own layers is our bug and keeps its traceback.
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
    """The arguments with ``~`` expanded where mlx-lm takes a path."""
    expanded = []
    for before, one in zip(["", *args], args, strict=False):
        flag, equals, value = one.partition("=")
        if before in _PATHS:
            one = os.path.expanduser(one)  # noqa: PTH111 - a Hub id must not be touched
        elif flag in _PATHS and equals:
            one = f"{flag}={os.path.expanduser(value)}"  # noqa: PTH111
        expanded.append(one)
    return expanded


def _is_unexpected(error: BaseException) -> bool:
    return not isinstance(error, ValueError | KeyError) and _raised_by_host(error)


def _check_inputs(args: list[str]) -> None:
    """Read the headers of a local model and adapter, which MLX would stumble over."""
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


def run_host_command(
    name: str,
    command_path: str,
    args: list[str],
    main: Callable[[], None] | None = None,
) -> None:
    """Call ``mlx_lm.<name>.main()`` with `args` as the command line.

    Args:
        name: The module of mlx_lm that holds the command.
        command_path: What mlx-lm's usage text calls the program.
        args: The arguments as typed, ``--help`` included.
        main: Called in place of mlx-lm's function.

    Raises:
        DoRAError: If mlx-lm refuses the model, the adapter or an argument's value.
    """
    from huggingface_hub.errors import HFValidationError

    from mlx_dora.adapters.hosting import use_in_mlx_lm

    previous = sys.argv
    sys.argv = [command_path, *_with_home(args)]
    try:
        _check_inputs(args)
        what = f"what mlx_lm.{name} was given"
        with use_in_mlx_lm(), foreign(what, by=_is_unexpected):
            (main or import_module(f"mlx_lm.{name}").main)()
    except DoRAError:
        raise
    except HFValidationError as error:  # a path that is not there, taken for a Hub id
        raise DoRAError(f"there is no such folder, and as a Hub id: {error}") from error
    except (ValueError, KeyError) as error:
        if not _raised_by_host(error):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        line = " ".join(str(text).split())
        raise DoRAError(f"mlx-lm: {line}") from error
    finally:
        sys.argv = previous
