import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.serve.desk import BusyError, Desk, StoppingError


def test_requests_beyond_the_limit_are_refused_until_one_is_done() -> None:
    desk = Desk(2)
    with desk.admit():
        with desk.admit(), pytest.raises(BusyError, match="--max-queue"), desk.admit():
            pass
        with desk.admit():
            assert desk.admitted == 2
    assert desk.admitted == 0


def test_an_error_in_a_request_frees_its_place() -> None:
    desk = Desk(1)
    with pytest.raises(KeyError), desk.admit():
        raise KeyError
    with desk.admit():
        pass


def test_a_stopping_desk_ends_when_its_requests_are_done() -> None:
    desk = Desk(5)
    assert not desk.may_end()
    with desk.admit():
        desk.stop(100)
        assert desk.is_stopping
        assert not desk.may_end()
        with pytest.raises(StoppingError), desk.admit():
            pass
    assert desk.may_end()


def test_requests_that_take_too_long_are_cut_off() -> None:
    desk = Desk(5)
    with desk.admit():
        desk.stop(0)
        with pytest.raises(DoRAError, match="1 unfinished requests"):
            desk.may_end()
