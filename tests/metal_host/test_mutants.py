"""Each planted bug is seen, and nothing is seen where nothing is planted."""

from functools import partial

import pytest

from tests.metal_host import lint
from tests.metal_host.host import Host, call, launched
from tests.metal_host.mutants import (
    EXAMINATIONS,
    USUAL_CASES,
    WIDE_EXAMINATIONS,
    Mutant,
    cases_of,
    edited,
    examine,
)
from tests.metal_host.planted import LANGUAGE_MUTANTS, MUTANTS
from tests.metal_host.records import Record


@pytest.fixture(scope="module")
def mutants_built(host: Host, every_case) -> Host:
    """The device with every mutant compiled, many at a time."""
    records: dict[bool, list[Record]] = {False: [], True: []}
    for mutant in MUTANTS:
        with edited(mutant.file, mutant.apply):
            cases = cases_of(mutant.kernel, every_case, mutant.cases)
            records[mutant.is_wide] += launched(partial(c.run, call) for c in cases)
    host.builder.build(records[False], "check")
    host.builder.build(records[True], "check-wide")
    return host


@pytest.mark.slow  # compiles every mutant
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_planted_bug_is_caught(mutant: Mutant, mutants_built: Host, every_case):
    cases = cases_of(mutant.kernel, every_case, mutant.cases)
    assert cases
    with edited(mutant.file, mutant.apply):
        examinations = WIDE_EXAMINATIONS if mutant.is_wide else EXAMINATIONS
        verdict = examine(mutants_built, cases, examinations)
    assert verdict, "survives"
    is_typed = mutant.is_refused_by_the_compiler
    assert verdict.startswith("does not compile") == is_typed, verdict


@pytest.mark.slow
@pytest.mark.parametrize("kernel", USUAL_CASES)
def test_nothing_is_found_where_nothing_is_planted(
    kernel: str, mutants_built: Host, every_case
):
    assert examine(mutants_built, cases_of(kernel, every_case)) == ""


@pytest.mark.parametrize("mutant", LANGUAGE_MUTANTS, ids=lambda m: m.name)
def test_breaches_of_metals_rules_are_caught(mutant: Mutant, every_case):
    pytest.importorskip("clang.cindex", reason="no libclang: pip install libclang")
    case, *_ = cases_of(mutant.kernel, every_case, mutant.cases)
    with edited(mutant.file, mutant.apply):
        records = launched([partial(case.run, call)])  # of both stages
    assert any(lint.text_errors(r.text) or lint.type_errors(r) for r in records), (
        "survives"
    )


def test_there_are_many_and_no_two_share_a_name():
    names = [mutant.name for mutant in (*MUTANTS, *LANGUAGE_MUTANTS)]
    assert len(set(names)) == len(names) >= 40
