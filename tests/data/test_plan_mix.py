"""Promises of `data_pipeline.plan.mix`: exact rates, quotas that never drift."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import mix
from data_pipeline.plan.phases import PlannedPhase, Quotas


def quota(rate: Fraction, w: int) -> int:
    """Draws of a source before window w."""
    return Quotas([0], PlannedPhase(0, (Fraction(1),), (rate,), 1)).before(w)[0]


fractions = st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=1000)
mixes = st.lists(st.tuples(fractions, st.integers(1, 10**9), st.fractions(1, 5000, max_denominator=10**6)), min_size=1, max_size=8)


@given(mixes, st.sampled_from(["samples", "tokens"]), st.integers(1, 10**6), st.integers(0, 10**9))
def test_window_totals_are_off_by_at_most_the_number_of_sources(held: list, unit: str, window: int, w: int) -> None:
    weights, sizes, means = map(list, zip(*held, strict=True))
    rates = mix.rates(unit, weights, sizes, means, window)
    assert sum(rates) == window
    total = sum(quota(rate, w + 1) - quota(rate, w) for rate in rates)
    assert abs(total - window) <= len(rates)


@given(mixes, st.integers(1, 10**6))
def test_shares_are_exact_in_the_unit_of_the_weights(held: list, window: int) -> None:
    weights, sizes, means = map(list, zip(*held, strict=True))
    by_samples = mix.rates("samples", weights, sizes, means, window)
    assert [rate / window for rate in by_samples] == [weight / sum(weights) for weight in weights]
    tokens = [rate * mean for rate, mean in zip(mix.rates("tokens", weights, sizes, means, window), means, strict=True)]
    assert [t / sum(tokens) for t in tokens] == [weight / sum(weights) for weight in weights]


@given(st.lists(st.tuples(st.fractions(0, 20, max_denominator=50), st.integers(1, 10**7)), min_size=1, max_size=8), st.integers(1, 10**6))
def test_epochs_end_exactly_with_the_last_window(held: list, window: int) -> None:
    weights, sizes = map(list, zip(*held, strict=True))
    draws = [int(weight * size) for weight, size in held]
    if sum(draws) == 0:
        with pytest.raises(ValueError, match="draws no sample"):
            mix.shares("epochs", weights, sizes, [])
        return
    windows = mix.epoch_windows(weights, sizes, window)
    rates = mix.rates("epochs", weights, sizes, [], window)
    assert [quota(rate, windows) for rate in rates] == draws
    assert (windows - 1) * window < sum(draws) <= windows * window


@given(mixes, st.sampled_from(mix.UNITS), st.integers(1, 10**6), st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_source_above_5_percent_gives_at_most_an_epoch_a_window(held: list, unit: str, window: int, w: int) -> None:
    weights, sizes, means = map(list, zip(*held, strict=True))
    weights = [max(weight, Fraction(1)) for weight in weights]
    shares = mix.shares(unit, weights, sizes, means)
    draws = mix.window_draws(shares, sizes, window)
    assert 1 <= draws <= window
    if draws == 1:
        return
    for share, size, rate in zip(shares, sizes, mix.rates(unit, weights, sizes, means, draws), strict=True):
        if share > Fraction(1, 20):
            assert quota(rate, w + 1) - quota(rate, w) <= size


def test_the_window_is_no_smaller_than_repeats_demand() -> None:
    half = Fraction(1, 2)
    assert mix.window_draws([half, half], [10**9, 10**9], 65_536) == 65_536
    assert mix.window_draws([half, half], [10**9, 1_000], 65_536) == 2_000
    assert mix.window_draws([Fraction(99, 100), Fraction(1, 100)], [10**9, 10], 65_536) == 65_536


@pytest.mark.parametrize(
    ("unit", "weights", "means", "message"),
    [
        ("steps", [Fraction(1)], [Fraction(1)], "unit 'steps'"),
        ("samples", [Fraction(-1)], [Fraction(1)], "negative"),
        ("samples", [Fraction(0)], [Fraction(1)], "draws no sample"),
        ("tokens", [Fraction(1)], [Fraction(0)], "without tokens"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(unit: str, weights: list, means: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix.shares(unit, weights, [10], means)
