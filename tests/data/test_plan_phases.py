"""Promises of `data_pipeline.plan.phases`: weights that change in the course of a run, without drift and without a walk."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import BUDGETS, POLICY, packs_of, source_of, text_source

from data_pipeline.plan import plan as plan_module
from data_pipeline.plan.origin import Origin
from data_pipeline.plan.phases import Phase, PlannedPhase, Quotas
from data_pipeline.plan.plan import Cursor, Plan

rate_rows = st.tuples(*[st.builds(Fraction, st.integers(0, 10**12), st.integers(1, 10**7))] * 3)
phase_lists = st.lists(st.tuples(st.integers(0, 10**6), rate_rows), min_size=1, max_size=5)


@given(phase_lists, st.lists(st.integers(0, 10**9), min_size=3, max_size=3), st.integers(0, 10**4), st.integers(0, 10**7))
@settings(max_examples=150)
def test_quotas_are_off_by_at_most_half_a_sample_at_any_border_of_any_phase(held: list, base: list, start: int, w: int) -> None:
    begins = np.cumsum([start, *(length for length, _ in held[:-1])]).tolist()
    phases = [PlannedPhase(begin, (), tuple(rates), 1) for begin, (_, rates) in zip(begins, held, strict=True)]
    quotas = Quotas(base, phases[0])
    for phase in phases[1:]:
        quotas.add(phase)
    for window in {start + w, *begins, *(begin + 1 for begin in begins)}:
        for source, drawn in enumerate(quotas.before(window)):
            exact = Fraction(base[source])
            for phase, end in zip(phases, [*begins[1:], None], strict=True):
                exact += phase.rates[source] * max(0, min(window, window if end is None else end) - phase.begin)
            assert abs(drawn - exact) <= Fraction(1, 2)
            assert drawn <= quotas.before(window + 1)[source]
    assert quotas.before(start) == base


def ingredients(**changes: Any) -> dict[str, Any]:
    """A run of 60 steps of 8 packs: half text, then documents come in, then text ends."""
    given = {
        "sources": [
            source_of("text", [[5], [30], [11, 2]] * 40),
            source_of("documents", [[-1, 20], [300, -1, 7], [-1, -1, -1, -1, 9]] * 30),
        ],
        "weights": [Fraction(1), Fraction(0)],
        "unit": "samples",
        "budgets": BUDGETS,
        "policy": POLICY,
        "overhead": [2, 3],
        "window": 20,
        "global_batch": 8,
        "seed": 11,
        "later": [Phase(Fraction("0.4"), (Fraction(1), Fraction(1))), Phase(Fraction("0.7"), (Fraction(0), Fraction("0.1")))],
        "steps": 60,
    }
    return {**given, **changes}


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_phase_begins_at_the_first_border_that_has_its_share_of_the_packs_before_it(unit: str) -> None:
    plan = Plan(**ingredients(unit=unit))
    packs = np.cumsum([0, *(len(plan.window(w)) for w in range(200))])
    for phase, at in zip(plan.phases[1:], (Fraction("0.4"), Fraction("0.7")), strict=True):
        assert packs[phase.begin - 1] < at * 60 * 8 <= packs[phase.begin]


@given(st.integers(2, 40), st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True), st.integers(5, 100))
@settings(max_examples=25)
def test_each_phase_draws_by_its_own_weights(window: int, places: list[int], steps: int) -> None:
    later = [Phase(Fraction(at, 100), (Fraction(at), Fraction(100 - at))) for at in sorted(places)]
    try:
        plan = Plan(**ingredients(window=window, later=later, steps=steps))
    except ValueError as error:  # a short run has no room for every phase
        assert "gets no window" in str(error)
        return
    ends = [phase.begin for phase in plan.phases[1:]] + [plan.phases[-1].begin + 7]
    for phase, end, weights in zip(plan.phases, ends, [(Fraction(1), Fraction(0)), *(phase.weights for phase in later)], strict=True):
        assert phase.begin < end
        rates = [phase.draws * weight / sum(weights) for weight in weights]
        before, after = (list(plan.drawn(Cursor(w, 0)).before.values()) for w in (phase.begin, end))
        assert all(abs(b - a - rate * (end - phase.begin)) <= 1 for a, b, rate in zip(before, after, rates, strict=True))
        drawn = plan.window(phase.begin).pieces
        assert {int(s) for s in drawn.source} <= {i for i, weight in enumerate(weights) if weight}


def test_a_window_reached_directly_is_the_window_reached_by_walking_through_phases() -> None:
    walked = Plan(**ingredients())
    for w in [*range(3), *(phase.begin + d for phase in walked.phases[1:] for d in (-1, 0, 1))]:
        assert packs_of(Plan(**ingredients()).window(w)) == packs_of(walked.window(w))


def test_a_sample_comes_once_an_epoch_whatever_the_phases_do() -> None:
    plan = Plan(**ingredients())
    last = plan.phases[-1].begin + 20
    for source in range(2):
        drawn = [(e, r) for w in range(last) for s, e, r, ends in rows(plan, w) if s == source and ends]
        assert len(set(drawn)) == len(drawn) == list(plan.drawn(Cursor(last, 0)).before.values())[source]
        for epoch in range(max(e for e, _ in drawn)):
            assert sum(e == epoch for e, _ in drawn) == len(plan._sources[source].rows)


def rows(plan: Plan, w: int) -> list[tuple[int, int, int, bool]]:
    pieces = plan.window(w).pieces
    return list(zip(*(column.tolist() for column in (pieces.source, pieces.epoch, pieces.row, pieces.last)), strict=True))


def test_the_place_of_a_phase_in_a_long_run_is_known_without_walking_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs are counted for the beginning of a phase only; the rest is extrapolated, and off by little."""
    exact = Plan(**ingredients(steps=5_000))
    monkeypatch.setattr(plan_module, "COUNTED_PACKS", 400)
    planned: list[int] = []
    plan_window = Plan._plan_window
    monkeypatch.setattr(Plan, "_plan_window", lambda plan, w: (planned.append(w), plan_window(plan, w))[1])
    quick = Plan(**ingredients(steps=5_000))
    assert len(planned) < 100
    for one, other in zip(exact.phases[1:], quick.phases[1:], strict=True):
        assert abs(one.begin - other.begin) < 0.02 * one.begin


def test_a_plan_that_takes_over_in_a_later_phase_begins_with_that_phase() -> None:
    whole = Plan(**ingredients())
    w, step = whole.phases[1].begin + 2, 30
    later = Plan(**ingredients(origin=Origin(w, step, whole.drawn(Cursor(w, 0)).before)))
    assert [phase.weights for phase in later.phases] == [phase.weights for phase in whole.phases[1:]]
    packs = sum(len(later.window(n)) for n in range(w, later.phases[1].begin))
    assert 0 <= packs - (Fraction("0.7") * 60 - step) * 8 < len(later.window(later.phases[1].begin - 1))


def test_a_phase_enters_the_digest_and_so_does_the_length_that_places_it() -> None:
    moved = [Phase(Fraction("0.5"), phase.weights) if i == 0 else phase for i, phase in enumerate(ingredients()["later"])]
    digests = [Plan(**ingredients(**c)).digest for c in ({}, {}, {"later": []}, {"steps": 90}, {"later": moved})]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert Plan(**ingredients(later=[], steps=90)).digest == digests[2]


def test_a_source_without_samples_may_not_come_in_later() -> None:
    sources = [ingredients()["sources"][0], text_source("documents", 5, np.zeros(5, bool))]
    with pytest.raises(ValueError, match="'documents' has a weight but no kept sample"):
        Plan(**ingredients(sources=sources))


half = (Fraction(1), Fraction(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "epochs", "weights": half}, "epochs count over the whole run"),
        ({"steps": None}, "train.steps"),
        ({"later": [Phase(Fraction(0), half)]}, "begins at 0: phases begin above 0"),
        ({"later": [Phase(Fraction(1), half)]}, "begins at 1: phases begin above 0 and below 1"),
        ({"later": [Phase(Fraction("0.5"), half), Phase(Fraction("0.5"), half)]}, "each after the one before"),
        ({"later": [Phase(Fraction("0.5"), half[:1])]}, "a weight for each of the 2 sources"),
        ({"later": [Phase(Fraction("0.5"), (Fraction(0), Fraction(0)))]}, "draws no sample"),
        ({"later": [Phase(Fraction("0.5"), half)], "steps": 1, "window": 100}, "phase at 0.5 gets no window: a window holds about"),
        ({"later": [Phase(Fraction("0.5"), half), Phase(Fraction("0.501"), half)]}, "phase at 0.501 gets no window"),
    ],
)
def test_phases_that_no_plan_can_follow_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**ingredients(**changes))
