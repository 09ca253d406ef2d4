"""Promises of `data_pipeline.plan.plan`: a global batch is a pure function of its cursor, and an epoch is an epoch."""

import hashlib
import itertools
from collections import Counter
from dataclasses import fields
from fractions import Fraction
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import BUDGETS, POLICY, ArraySource, epoch_plans, packs_of, raw, source_of, text_source

from data_pipeline.plan import plan as plan_module
from data_pipeline.plan.columns import Budgets, ImagePolicy
from data_pipeline.plan.plan import Cursor, GlobalBatch, Plan
from data_pipeline.plan.split import Pieces

START = Cursor(0, 0)


def walk(plan: Plan, cursor: Cursor = START) -> list[GlobalBatch]:
    batches = []
    while not batches or not batches[-1].done:
        batches.append(plan.global_batch(cursor))
        cursor = batches[-1].cursor
    return batches


def ingredients() -> dict[str, Any]:
    return {
        "sources": [
            source_of("a", [[-1, 20], [5], [300, -1, 7], [-1, -1, -1, -1, 9]] * 30),
            source_of("b", [[11], [40, 2]] * 50, [True, False] * 50),
        ],
        "weights": [Fraction(1), Fraction("0.5")],
        "unit": "samples",
        "budgets": BUDGETS,
        "policy": POLICY,
        "overhead": [2, 3],
        "window": 40,
        "global_batch": 8,
        "seed": 11,
    }


@given(epoch_plans())
@settings(max_examples=60)
def test_the_first_window_of_a_sample_is_where_walking_meets_it_first(drawn: tuple[Plan, list[ArraySource], list[Fraction]]) -> None:
    plan, held, _ = drawn
    met: dict[tuple[int, int], int] = {}
    for w in range(plan.windows or 0):
        pieces = plan.window(w).pieces
        for sample in zip(pieces.source.tolist(), pieces.row.tolist(), strict=True):
            met.setdefault(sample, w)
    for number, source in enumerate(held):
        for row in range(int(source.rows[-1]) + 2):
            assert plan.first_window(number, row) == met.get((number, row))


def test_the_first_window_of_a_sample_of_an_endless_mix_is_found_however_far() -> None:
    sources = [text_source("often", 50_000), text_source("rarely", 2_000), text_source("never", 10)]
    plan = Plan(
        sources, [Fraction(1), Fraction("0.0001"), Fraction(0)], "samples", Budgets(64, 1, 8), ImagePolicy(16), [2] * 3, 100, 4, seed=1
    )
    for row in (0, 999, 1_999):
        w = plan.first_window(1, row)
        assert w is not None
        pieces = plan.window(w).pieces
        assert (0, row) in zip(pieces.epoch[pieces.source == 1].tolist(), pieces.row[pieces.source == 1].tolist(), strict=True)
    assert plan.first_window(2, 0) is None


@given(epoch_plans())
@settings(max_examples=100)
def test_over_the_run_every_kept_sample_appears_once_an_epoch(drawn: tuple[Plan, list[ArraySource], list[Fraction]]) -> None:
    plan, sources, weights = drawn
    batches = walk(plan)
    found = Counter(
        (s, e, r) for b in batches for p in b.packs for s, e, r in zip(p.source[p.last], p.epoch[p.last], p.row[p.last], strict=True)
    )
    assert set(found.values()) == {1}
    for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        times = Counter(int(row) for number, _, row in found if number == i)
        assert sum(times.values()) == int(weight * len(source.rows))
        assert all(int(weight) <= times[row] <= -int(-weight // 1) for row in source.rows.tolist())
        assert set(times) <= set(source.rows.tolist())


@given(epoch_plans())
@settings(max_examples=100)
def test_over_the_run_every_token_of_a_drawn_sample_appears_once(drawn: tuple[Plan, list[ArraySource], list[Fraction]]) -> None:
    plan, sources, _ = drawn
    spans: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for batch in walk(plan):
        for p in batch.packs:
            columns = (p.source, p.epoch, p.row, p.start_element, p.start_offset, p.end_element, p.end_offset)
            for s, e, r, *span in zip(*(column.tolist() for column in columns), strict=True):
                spans.setdefault((s, e, r), []).append(tuple(span))
    for (s, _, r), held in spans.items():
        held.sort()
        assert held[0][:2] == (0, 0)
        assert held[-1][2:] == (sources[s].elements(np.array([r]))[0][0], 0)
        assert all(before[2:] == after[:2] for before, after in itertools.pairwise(held))


@given(epoch_plans())
@settings(max_examples=60)
def test_no_pack_is_over_a_budget_and_none_is_empty(drawn: tuple[Plan, list[ArraySource], list[Fraction]]) -> None:
    for batch in walk(drawn[0]):
        for pieces in batch.packs:
            assert 1 <= len(pieces) <= BUDGETS.segments
            assert pieces.tokens.sum() <= BUDGETS.tokens
            assert pieces.images.sum() <= BUDGETS.images


@given(epoch_plans(), st.data())
@settings(max_examples=60)
def test_global_batches_are_the_windows_packs_from_any_cursor(
    drawn: tuple[Plan, list[ArraySource], list[Fraction]], data: st.DataObject
) -> None:
    plan, _, _ = drawn
    assert plan.windows is not None
    everything = [pack for w in range(plan.windows) for pack in packs_of(plan.window(w))]
    batches = walk(plan)
    assert [raw(pack) for batch in batches for pack in batch.packs] == everything
    assert all(len(batch.packs) == plan._batch_packs for batch in batches[:-1])
    start = Cursor(data.draw(st.integers(0, plan.windows - 1)), 0)
    start = Cursor(start.window, data.draw(st.integers(0, len(plan.window(start.window)))))
    before = sum(len(plan.window(w)) for w in range(start.window)) + start.pack
    assert [raw(pack) for batch in walk(plan, start) for pack in batch.packs] == everything[before:]


@given(epoch_plans())
@settings(max_examples=60)
def test_cursors_rise_are_normal_and_progress_ends_at_one(drawn: tuple[Plan, list[ArraySource], list[Fraction]]) -> None:
    plan, _, _ = drawn
    batches = walk(plan)
    cursors = [START, *(batch.cursor for batch in batches)]
    assert all(before < after for before, after in itertools.pairwise(cursors))
    assert all(c.pack == 0 or c.pack < len(plan.window(c.window)) for c in cursors)
    progress = [batch.progress for batch in batches]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    after_the_end = plan.global_batch(batches[-1].cursor)
    assert (after_the_end.packs, after_the_end.cursor, after_the_end.done) == ([], batches[-1].cursor, True)


def test_windows_that_draw_nothing_do_not_delay_the_end() -> None:
    """Three windows of one draw; the quotas of three equal sources of one sample all tick in the second."""
    given = {**ingredients(), "unit": "epochs", "window": 1, "global_batch": 1, "weights": [Fraction(1)] * 3, "overhead": [2] * 3}
    plan = Plan(**{**given, "sources": [source_of(name, [[1]]) for name in "abc"]})
    assert [len(plan.window(w)) for w in range(3)] == [0, 1, 0]
    batch = plan.global_batch(START)
    assert (len(batch.packs), batch.cursor, batch.done, batch.progress) == (1, Cursor(3, 0), True, 1.0)


@pytest.mark.parametrize("unit", ["samples", "tokens", "epochs"])
def test_a_window_reached_directly_is_the_window_reached_by_walking(unit: str) -> None:
    walked = Plan(**{**ingredients(), "unit": unit, "weights": [Fraction(7), Fraction("3.5")]})
    for w in range(12):
        direct = Plan(**{**ingredients(), "unit": unit, "weights": [Fraction(7), Fraction("3.5")]})
        assert packs_of(direct.window(w)) == packs_of(walked.window(w))


def test_a_batch_resumed_from_its_cursor_is_the_same_batch() -> None:
    plan, cursor = Plan(**ingredients()), START
    for _ in range(12):
        resumed = Plan(**ingredients()).global_batch(cursor)
        batch = plan.global_batch(cursor)
        assert [raw(pack) for pack in batch.packs] == [raw(pack) for pack in resumed.packs]
        assert (batch.cursor, batch.done, batch.progress) == (resumed.cursor, False, None)
        cursor = batch.cursor


def test_sources_get_their_share_and_carry_their_identity() -> None:
    plan = Plan(
        **{
            **ingredients(),
            "sources": [text_source("a", 10**6), text_source("b", 10**6)],
            "weights": [Fraction("0.9"), Fraction("0.1")],
            "window": 1_000,
        }
    )
    assert np.bincount(plan.window(3).pieces.source).tolist() == [900, 100]


def test_packs_of_a_window_do_not_come_sorted_by_fill() -> None:
    plan = Plan(**{**ingredients(), "window": 200, "weights": [Fraction(1), Fraction(0)]})
    window = plan.window(0)
    fill = np.add.reduceat(window.pieces.tokens, window.pack_starts[:-1])
    assert abs(np.corrcoef(fill, np.arange(len(fill)))[0, 1]) < 0.3
    assert len(set(fill.tolist())) > 3


def test_adding_a_source_leaves_the_order_inside_the_others() -> None:
    alone = Plan(**{**ingredients(), "sources": ingredients()["sources"][1:], "weights": [Fraction(1)], "overhead": [3]})
    both = Plan(**ingredients())
    drawn = [both._orders[1].draws(0, 50)[1].tolist(), alone._orders[0].draws(0, 50)[1].tolist()]
    assert drawn[0] == drawn[1]


def test_a_small_source_that_repeats_inside_a_window_is_reported() -> None:
    given = ingredients()
    given |= {"sources": [text_source("large", 10**6), text_source("small", 10)], "weights": [Fraction(99), Fraction(1)], "window": 65_536}
    plan = Plan(**given)
    assert plan.phases[0].draws == 65_536
    assert plan.repeats == {"small": Fraction(65_536, 1_000)}
    assert Plan(**{**given, "weights": [Fraction(9), Fraction(1)]}).phases[0].draws == 100


CHANGES = {
    "sources": [source_of("other", [[1]]), source_of("b", [[1]])],
    "weights": [Fraction(1), Fraction("0.6")],
    "unit": "tokens",
    "budgets": Budgets(65, 3, 5),
    "policy": ImagePolicy(17),
    "overhead": [2, 4],
    "window": 41,
    "global_batch": 9,
    "seed": 12,
    "extra_digest": "templates",
}


@pytest.mark.parametrize("changed", CHANGES)
def test_the_digest_changes_with_every_ingredient(changed: str) -> None:
    assert Plan(**ingredients()).digest == Plan(**ingredients()).digest
    assert Plan(**{**ingredients(), changed: CHANGES[changed]}).digest != Plan(**ingredients()).digest


def test_the_digest_changes_with_the_planner_and_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    before, given = Plan(**ingredients()).digest, ingredients()
    given["sources"][0].digest = "another selection"
    assert Plan(**given).digest != before
    monkeypatch.setattr(plan_module, "PLANNER_VERSION", plan_module.PLANNER_VERSION + 1)
    assert Plan(**ingredients()).digest != before


def test_the_plan_is_pinned_to_the_planner_version() -> None:
    """Where this fails on purpose, raise PLANNER_VERSION: checkpoints of the old order must not resume in the new one."""
    columns = hashlib.sha256()
    plan = Plan(**ingredients())
    for w in (0, 1, 1_000_003):
        for f in fields(Pieces):
            columns.update(getattr(plan.window(w).pieces, f.name).astype("<i8").tobytes())
        columns.update(plan.window(w).pack_starts.astype("<i8").tobytes())
    assert (plan_module.PLANNER_VERSION, columns.hexdigest()[:16]) == (1, "4a16c3daf456872b")


def test_a_cached_window_is_readable_while_another_thread_plans() -> None:
    plan = Plan(**ingredients())
    cached, source = plan.window(0), plan._sources[0]
    planning, go_on, elements = Event(), Event(), source.elements

    def slow(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        planning.set()
        assert go_on.wait(20)
        return elements(rows)

    source.elements = slow
    ahead = Thread(target=plan.window, args=(1,))
    ahead.start()
    assert planning.wait(20)
    reader = Thread(target=plan.window, args=(0,), daemon=True)
    reader.start()
    reader.join(5)
    blocked = reader.is_alive()
    go_on.set()
    ahead.join()
    assert not blocked
    assert plan.window(0) is cached


def test_windows_outside_the_run_and_cursors_of_other_plans_are_refused() -> None:
    plan = Plan(**{**ingredients(), "unit": "epochs"})
    with pytest.raises(IndexError):
        plan.window(plan.windows)
    with pytest.raises(IndexError):
        plan.window(-1)
    with pytest.raises(ValueError, match="belongs to another plan"):
        plan.global_batch(Cursor(0, 10**6))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": [source_of("a", [[1]]), source_of("a", [[1]])]}, "same name"),
        ({"sources": [source_of("a", [[1]]), source_of("b", [[1]], [False])]}, "'b' has a weight but no kept sample"),
        ({"policy": ImagePolicy(63)}, "source 'a': an image of 63 tokens"),
        ({"window": 0}, "at least 1"),
        ({"overhead": [2]}, "1 overheads"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_when_it_is_made(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{**ingredients(), **changed})
