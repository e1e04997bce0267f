import dataclasses

from mlx_dora.doctor.checks import check_layers


def test_layers_are_right_on_this_machine() -> None:
    assert [check.name for check in check_layers() if not check.is_right] == []


def test_a_nan_is_not_right() -> None:
    check = check_layers()[0]
    assert not dataclasses.replace(check, error=float("nan")).is_right
