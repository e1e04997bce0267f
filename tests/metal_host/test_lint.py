"""Every generated text keeps Metal's own rules, and what stands in for Metal holds."""

from functools import partial

import pytest

from tests.metal_host import lint
from tests.metal_host.host import call, launched


@pytest.fixture(scope="module")
def records(every_case):
    """One record of each text."""
    every = launched(partial(case.run, call) for case in every_case)
    return list({record.key: record for record in every}.values())


def test_texts_keep_the_rules(records):
    assert len(records) > 100
    assert [(r.name, e) for r in records for e in lint.text_errors(r.text)] == []


def test_texts_keep_the_types_and_address_spaces(records):
    pytest.importorskip("clang.cindex", reason="no libclang: pip install libclang")
    chosen = [r for r in records if "bfloat" in r.name or "packed" in r.name]
    assert len(chosen) > 40
    assert [(r.name, e) for r in chosen for e in lint.type_errors(r)] == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("float x = 1.0;", "a double"),
        ("float x = 1e-6;", "a double"),
        ("double x;", "no double"),
        ("float x = std::sqrt(y);", "no std"),
        ("auto f = [&](int i) { return i; };", "no lambdas"),
        ("#include <foo>", "nothing to include"),
        ("goto end;", "not in the Metal"),
    ],
)
def test_a_breach_is_seen(text: str, reason: str):
    assert any(reason in error for error in lint.text_errors(text))


@pytest.mark.parametrize(
    "text", ["float x = 1.0f;", "uint x = 10;", "// 1.0 double std::x", "a[i] = 2;"]
)
def test_what_is_allowed_passes(text: str):
    assert lint.text_errors(text) == []
