import json
from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.run.guard import Best, Guard
from mlx_dora.train.run.meter import Meter
from mlx_dora.train.run.state import parse_state


def good() -> dict[str, Any]:
    content = {
        "step": 6,
        "log_bytes": 10,
        "meter": Meter().state(),
        "guard": Guard(3).state(),
        "best": Best(patience=0).state(),
        "settings": {"seed": 0},
    }
    return json.loads(json.dumps(content))


def test_a_written_state_is_read_back() -> None:
    content = good()
    state = parse_state(content, 6)
    assert (state.step, state.settings) == (6, {"seed": 0})
    assert state.meter == content["meter"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("step", "6", "step must be a whole number"),
        ("step", -2, "step must be"),
        ("step", True, "step must be"),
        ("step", 10**9, "step is 1000000000 in the folder of step 6"),
        ("log_bytes", -1, "log_bytes must be"),
        ("meter", {}, "meter.loss is missing"),
        ("meter.count", "3", "meter.count must be a whole number"),
        ("meter.table", [1.0, "2"], "meter.table must be a list of finite numbers"),
        ("meter.loss", float("nan"), "meter.loss must be a finite number"),
        ("meter.seconds", -1.0, "meter.seconds must be"),
        ("guard", {}, "guard.in_a_row is missing"),
        ("guard.empty", 0.5, "guard.empty must be"),
        ("best", None, "best.loss is missing"),
        ("best.step", "3", "best.step must be"),
        ("settings", [], "settings must be an object"),
    ],
)
def test_a_field_of_wrong_type_or_range_is_named(
    name: str, value: Any, reason: str
) -> None:
    content = good()
    group, _, key = name.rpartition(".")
    (content[group] if group else content)[key] = value
    with pytest.raises(DoRAError) as caught:
        parse_state(content, 6)
    assert reason in str(caught.value)


def test_a_meter_of_version_0_1_is_continued() -> None:
    content = good()
    content["meter"] |= {"loss": 3.0, "tokens": 4}
    del content["meter"]["count"], content["meter"]["table"]
    meter = Meter()
    meter.restore(parse_state(content, 6).meter)
    assert (meter.loss, meter.count, meter.tokens, meter.table) == (3.0, 4, 4, [])
