"""The boundary to other libraries that read a user's file.

mlx-lm, transformers, tokenizers, huggingface_hub and MLX raise many kinds of errors for
a damaged or hostile file: a plain ``Exception`` (tokenizers), a ``RuntimeError`` (MLX),
an ``AttributeError`` or ``ZeroDivisionError`` (a config that they do not check). No
list of kinds is complete, so this is the only place that catches every exception. So
may a function that the user wrote, such as a reward.
"""

import contextlib
from collections.abc import Callable, Iterator

from mlx_dora.errors import DoRAError


@contextlib.contextmanager
def foreign(
    source: object, *, by: Callable[[BaseException], bool] | None = None
) -> Iterator[None]:
    """Turn an exception of another library into one line that names the user's file.

    Put only the foreign call in the block: a bug of ours in it would be reported as a
    damaged file. `DoRAError` and errors of the operating system pass through.

    Args:
        source: The file or folder that the error names.
        by: Whether another library raised a given error; needed when the block also
            runs our code. An error for which it returns false passes through.

    Raises:
        DoRAError: In place of any other exception.
    """
    try:
        yield
    except DoRAError:
        raise
    # `Exception`, for the reason at the top of this file.
    except Exception as error:
        is_system = isinstance(error, OSError) and error.strerror is not None
        if is_system or (by is not None and not by(error)):
            raise
        raise DoRAError(f"cannot load {source}: {_reason(error)}.") from error


@contextlib.contextmanager
def user_code(name: str) -> Iterator[None]:
    """Turn an exception of a function that the user wrote into one line.

    Args:
        name: What the line calls the function.

    Raises:
        DoRAError: In place of any exception.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        kind = "" if isinstance(error, DoRAError) else f"{type(error).__name__}: "
        raise DoRAError(f"{name} failed: {kind}{text}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):
        return f"{text or 'a key'} is missing"
    # These messages are written for users; the others need the name of the class.
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
