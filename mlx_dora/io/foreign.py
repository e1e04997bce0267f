"""The boundary to code of others that is given a user's file.

mlx-lm, transformers, tokenizers, huggingface_hub and MLX raise whatever comes up when a
file is damaged or hostile: a plain ``Exception`` (tokenizers), a ``RuntimeError``
(MLX), an ``AttributeError`` or ``ZeroDivisionError`` (a config that no check of theirs
covers). No list of kinds is complete, so this is the one place that catches all.
"""

import contextlib
from collections.abc import Callable, Iterator

from mlx_dora.errors import DoRAError


@contextlib.contextmanager
def foreign(
    source: object, *, by: Callable[[BaseException], bool] | None = None
) -> Iterator[None]:
    """Turn what foreign code raises on a file into one line that names the file.

    Keep the block to the foreign call alone: a mistake of ours in it would pass for a
    damaged file. `DoRAError` and what the operating system says of a file pass through.

    Args:
        source: What the error names: the file or folder that was handed over.
        by: Says of an error whether foreign code raised it, where the block runs code
            of ours too; an error that it denies passes through.

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


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, KeyError):
        return f"{text or 'a key'} is missing"
    # The words of these are written for users; of the others the kind says more.
    if isinstance(error, ValueError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
