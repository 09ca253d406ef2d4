"""Promises of a change of plan: sources go on where they were, and the interrupted window is repeated or skipped as was said."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import BUDGETS, POLICY, ArraySource, sources, text_source

from data_pipeline.plan.origin import Cursor, Drawn, Origin
from data_pipeline.plan.plan import Plan

Held = Counter[tuple[str, int, int, int, int]]
"""Pieces: source, epoch, row, and where in the sample they begin."""


def make(held: list[ArraySource], weights: list[Fraction], unit: str, **changes: Any) -> Plan:
    given = {"window": 30, "global_batch": 3, "seed": 5, **changes}
    return Plan(held, weights, unit, BUDGETS, POLICY, [2] * len(held), **given)


def pieces_of(plan: Plan, first: int, last: int, w: int) -> Held:
    """What the packs [first, last) of a window hold."""
    packs = plan.window(w).part(first, last).pieces
    columns = (packs.source, packs.epoch, packs.row, packs.start_element, packs.start_offset)
    return Counter((plan._sources[s].name, *rest) for s, *rest in zip(*(c.tolist() for c in columns), strict=True))


def consumed(plan: Plan, start: Cursor, end: Cursor) -> Held:
    """What lies between two cursors."""
    found: Held = Counter()
    for w in range(start.window, end.window + (end.pack > 0)):
        first = start.pack if w == start.window else 0
        found += pieces_of(plan, first, end.pack if w == end.window else len(plan.window(w)), w)
    return found


def some_steps(plan: Plan, steps: int) -> Cursor:
    """Where some steps of the plan end, before its own end."""
    cursor = Cursor(plan.origin.window, 0)
    for _ in range(steps):
        batch = plan.global_batch(cursor)
        if batch.done:
            break
        cursor = batch.cursor
    return cursor


mixes = st.sampled_from([["1", "2", "1"], ["0.1", "1", "0"], ["0", "0.3", "3"], ["1", "1", "1"]])


@given(st.data())
@settings(max_examples=60)
def test_a_change_repeats_and_skips_exactly_what_it_says(data: st.DataObject) -> None:
    held = [data.draw(sources(name)) for name in "abc"]
    repeat = data.draw(st.booleans())
    old = make(held, [Fraction(w) for w in data.draw(mixes)], data.draw(st.sampled_from(["samples", "epochs"])))
    cursor = some_steps(old, data.draw(st.integers(0, 12)))
    origin = old.drawn(cursor).origin(cursor, 4, repeat)
    new = make(
        held, [Fraction(w) for w in data.draw(mixes)], "samples", window=data.draw(st.integers(1, 50)), global_batch=4, origin=origin
    )
    until = Cursor(origin.window + 6, 0)
    seen = consumed(old, Cursor(0, 0), cursor) + consumed(new, Cursor(origin.window, 0), until)

    packs = len(old.window(cursor.window)) if cursor.pack else 0
    begun, rest = (pieces_of(old, *part, cursor.window) if packs else Counter() for part in ((0, cursor.pack), (cursor.pack, packs)))
    drawn = new.drawn(until).before
    whole = Counter(p for i, s in enumerate(held) for p in pieces_of_draws(new, i, drawn[s.name]))
    # everything once up to where the new plan has come, but for the interrupted window
    assert seen == (whole + begun if cursor.pack and repeat else whole - rest)


def pieces_of_draws(plan: Plan, source: int, draws: int) -> Held:
    pieces = plan._draw(source, 0, draws)
    name = plan._sources[source].name
    return Counter(
        (name, *rest)
        for rest in zip(*(c.tolist() for c in (pieces.epoch, pieces.row, pieces.start_element, pieces.start_offset)), strict=True)
    )


@given(st.data())
@settings(max_examples=60)
def test_a_changed_mix_of_epochs_still_ends_each_source_after_its_epochs(data: st.DataObject) -> None:
    held = [data.draw(sources(name)) for name in "ab"]
    old = make(held, [Fraction(1), Fraction(2)], "epochs")
    cursor = some_steps(old, data.draw(st.integers(0, 12)))
    origin = old.drawn(cursor).origin(cursor, 0, data.draw(st.booleans()))
    epochs = [Fraction(data.draw(st.integers(1, 6)), 2), Fraction(3)]
    new = make(held, epochs, "epochs", window=data.draw(st.integers(1, 50)), origin=origin)
    ends = new.drawn(Cursor(new.windows, 0)).before
    for source, weight in zip(held, epochs, strict=True):
        assert ends[source.name] == max(origin.ordinals[source.name], int(weight * len(source.rows)))
    assert new.global_batch(Cursor(new.windows, 0)).done


def test_a_source_keeps_its_place_while_it_is_left_out_and_when_it_comes_back() -> None:
    a, b, c = (text_source(name, 1_000) for name in "abc")
    first = make([a, b], [Fraction(1), Fraction(1)], "samples", window=100)
    second = make(
        [a, c], [Fraction(1), Fraction(1)], "samples", window=100, origin=first.drawn(Cursor(3, 0)).origin(Cursor(3, 0), 3, repeat=True)
    )
    assert second.drawn(Cursor(5, 0)).before == {"a": 250, "b": 150, "c": 100}
    third = make(
        [b, c], [Fraction(1), Fraction(3)], "samples", window=100, origin=second.drawn(Cursor(5, 0)).origin(Cursor(5, 0), 5, repeat=True)
    )
    assert third.drawn(Cursor(6, 0)).before == {"a": 250, "b": 175, "c": 175}
    assert third.window(5).pieces.row[third.window(5).pieces.source == 0].tolist() != []
    drawn = [first._orders[1].draws(0, 150)[1], third._orders[0].draws(150, 175)[1]]
    assert not set(drawn[0].tolist()) & set(drawn[1].tolist())


def test_a_cursor_between_two_windows_interrupts_none() -> None:
    plan = make([text_source("a", 1_000)], [Fraction(1)], "samples")
    cursor = Cursor(7, 0)
    assert (
        plan.drawn(cursor).origin(cursor, 9, repeat=True) == plan.drawn(cursor).origin(cursor, 9, repeat=False) == Origin(7, 9, {"a": 210})
    )


def test_taking_over_without_a_change_is_going_on() -> None:
    sources_ab, weights = [text_source(name, 500) for name in "ab"], [Fraction(1), Fraction("0.37")]
    whole = make(sources_ab, weights, "samples")
    for w in (0, 1, 17):
        later = make(sources_ab, weights, "samples", origin=whole.drawn(Cursor(w, 0)).origin(Cursor(w, 0), 0, repeat=True))
        ahead = [
            abs(a - b)
            for a, b in zip(later.drawn(Cursor(w + 9, 0)).before.values(), whole.drawn(Cursor(w + 9, 0)).before.values(), strict=True)
        ]
        assert max(ahead) <= 1  # each plan rounds from its own beginning


def test_the_origin_enters_the_digest() -> None:
    held, weights = [text_source("a", 500)], [Fraction(1)]
    origins = [Origin(), Origin(3, 0, {"a": 90}), Origin(3, 0, {"a": 91}), Origin(4, 0, {"a": 90})]
    assert len({make(held, weights, "samples", origin=origin).digest for origin in origins}) == 4
    assert make(held, weights, "samples", origin=Origin()).digest == make(held, weights, "samples").digest


def test_what_lies_before_the_origin_belongs_to_another_plan() -> None:
    plan = make([text_source("a", 500)], [Fraction(1)], "samples", origin=Origin(3, 0, {"a": 90}))
    with pytest.raises(IndexError):
        plan.window(2)
    with pytest.raises(ValueError, match="belongs to another plan"):
        plan.global_batch(Cursor(2, 0))


def test_a_change_to_epochs_that_are_done_already_is_refused() -> None:
    with pytest.raises(ValueError, match="all its epochs are done"):
        make([text_source("a", 500)], [Fraction(1)], "epochs", origin=Origin(20, 0, {"a": 500}))


DRAWN = Drawn({"a": 100, "b": 50, "x": 7}, {"a": 140, "b": 55, "x": 7}, {"a": "1", "b": "1"})


@pytest.mark.parametrize(
    ("pack", "repeat", "digests", "says"),
    [
        (30, True, {"a": "1", "b": "1"}, "window 12 (a 40, b 5 samples) is drawn again: what its first 30 packs held is repeated"),
        (30, False, {"a": "1", "b": "1"}, "window 12 (a 40, b 5 samples) is left after 30 packs: what its other packs held is skipped"),
        (30, False, {"a": "1", "c": "1"}, "; c is new; b stops after 55 draws"),
        (30, True, {"a": "1", "b": "2"}, "; the samples of b changed: some may come twice in an epoch, others not at all"),
        (30, True, {"a": "1", "b": "1", "x": "1"}, "; x goes on after 7 draws"),
        (0, True, {"a": "1", "b": "1"}, "it takes over between windows, at 12: nothing is repeated or skipped"),
        (0, False, {"a": "1"}, "; b stops after 50 draws"),
    ],
)
def test_the_user_is_told_what_a_change_does(pack: int, repeat: bool, digests: dict[str, str], says: str) -> None:
    assert says in DRAWN.change(Cursor(12, pack), repeat, digests)
