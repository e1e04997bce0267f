import errno

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Exception("bad vocab\nin line 3"), "cannot load m: Exception: bad vocab in"),
        (RuntimeError("[load] no."), "cannot load m: RuntimeError: [load] no."),
        (KeyError("model_type"), "cannot load m: 'model_type' is missing."),
        (ValueError("no such type"), "cannot load m: no such type."),
        (ZeroDivisionError(), "cannot load m: ZeroDivisionError."),
        (OSError("Can't load tokenizer"), "cannot load m: Can't load tokenizer."),
    ],
)
def test_whatever_foreign_code_raises_names_the_file(
    error: Exception, line: str
) -> None:
    with pytest.raises(DoRAError) as caught, foreign("m"):
        raise error
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [DoRAError("ours"), OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()]
)
def test_what_says_enough_already_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign("m"):
        raise error
    assert caught.value is error


def test_an_error_of_our_own_code_keeps_its_kind() -> None:
    with pytest.raises(ZeroDivisionError), foreign("m", by=lambda error: False):
        raise ZeroDivisionError
