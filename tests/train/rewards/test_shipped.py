from typing import Any

import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.train.rewards import exact_match, number_match, regex_match, valid_json


def test_exact_match_ignores_white_space_around_the_answer() -> None:
    given = [" Paris\n", "paris", "Paris!", ""]
    assert exact_match(given, ["Paris"] * 4) == [1, 0, 0, 0]
    assert exact_match(given, ["Paris"] * 4, ignore_case=True) == [1, 1, 0, 0]


def test_completions_may_be_messages() -> None:
    given = [[{"role": "assistant", "content": "Paris"}], [{"role": "assistant"}]]
    assert exact_match(given, ["Paris"] * 2) == [1, 0]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("It is 5, so 12.", 12, 1),
        ("12 and then 5", 12, 0),
        ("1,234.5", "1234.5", 1),
        ("12,5", 5, 1),  # no group of three: two numbers
        ("-7", -7, 1),
        (".5", 0.5, 1),
        ("none", 0, 0),
        ("42", "First 41 + 1.\n#### 42", 1),
    ],
)
def test_the_last_number_counts(text: str, answer: Any, reward: float) -> None:
    assert number_match([text], [answer]) == [reward]


def test_numbers_may_differ_by_the_tolerance() -> None:
    assert number_match(["3.1", "3.2"], [3, 3], tolerance=0.15) == [1, 0]


def test_an_answer_without_a_number_is_an_error() -> None:
    with pytest.raises(DoRAError, match="the answer 'none' holds no number"):
        number_match(["1"], ["none"])


def test_a_pattern_matches_the_whole_completion() -> None:
    assert regex_match(["12", "12 ", "a 12", "1\n2"], r"\d.*") == [1, 1, 0, 1]
    assert regex_match(["a 12"], r"\d+", search=True) == [1]
    assert regex_match(["12", "12"], [r"\d+", r"\d"]) == [1, 0]


def test_a_bad_pattern_is_an_error() -> None:
    with pytest.raises(DoRAError, match=r"'\(' is not a regular expression"):
        regex_match(["1"], "(")


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "tag": {"enum": ["a", 1]}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ('{"n": 1}', 1),
        (' {"n": 2.0, "tag": "a"}\n', 1),
        ('{"n": 0}', 0),
        ('{"n": true}', 0),
        ('{"n": 1, "tag": true}', 0),  # true is not 1
        ('{"tag": "a"}', 0),
        ('{"n": 1, "x": 2}', 0),
        ('{"n": 1} and more', 0),
        ("[" * 100_000, 0),
        ('{"n": NaN}', 0),
        ("[1]", 0),
        ("", 0),
    ],
)
def test_json_must_satisfy_the_schema(text: str, reward: float) -> None:
    assert valid_json([text], SCHEMA) == [reward]


def test_without_a_schema_any_json_is_good() -> None:
    assert valid_json(["[1, null]", "3", "x"]) == [1, 1, 0]
    assert valid_json(["3", '"3"'], ['{"type": "number"}'] * 2) == [1, 0]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"items": {"type": "string"}, "minItems": 1}, '["a"]', '["a", 1]'),
        ({"type": ["string", "null"]}, "null", "0"),
        ({"const": {"a": [1]}}, '{"a": [1]}', '{"a": [2]}'),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, "3", "2"),
        ({"allOf": [{"minimum": 3}, {"maximum": 5}]}, "5", "6"),
        ({"exclusiveMinimum": 3}, "3.5", "3"),
        ({"type": "string", "pattern": "^a", "maxLength": 2}, '"ab"', '"abc"'),
        ({"properties": {"a": False}}, "{}", '{"a": 1}'),
    ],
)
def test_keywords_of_a_schema(schema: Any, good: str, bad: str) -> None:
    assert valid_json([good, bad], schema) == [1, 0]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "text"}, "the schema.type must not be 'text'"),
        (
            {"properties": {"a": {"format": "date"}}},
            "properties.a.format: this keyword",
        ),
        ({"items": 3}, "the schema.items must be an object"),
        ({"pattern": "("}, "the schema.pattern must not be"),
        ("{", "the schema is not JSON"),
    ],
)
def test_a_bad_schema_is_an_error(schema: Any, reason: str) -> None:
    with pytest.raises(DoRAError, match=reason):
        valid_json(["1"], schema)
