"""Promises of `data_pipeline.plan.order`: every kept sample once an epoch, in an order that only the seed and the rows decide."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_strategies import ArraySource, sources, text_source

from data_pipeline.plan.order import EpochOrder, group_blocks, splitmix64

seeds = st.integers(0, 2**64 - 1)


@given(sources(), seeds, st.integers(0, 5))
@settings(max_examples=100)
def test_every_kept_sample_once_an_epoch(source: ArraySource, seed: int, epoch: int) -> None:
    order = EpochOrder(source, seed, 1)
    assert sorted(order.rows(epoch, 0, order.samples).tolist()) == source.rows.tolist()


@pytest.mark.parametrize("block_rows", [1, 250, 300, 100_000])
def test_every_kept_sample_once_an_epoch_of_many_groups(block_rows: int) -> None:
    source = text_source("many", 100_000, np.random.RandomState(0).rand(100_000) < 0.9, block_rows)
    rows = EpochOrder(source, 5, 1).rows(2, 0, len(source.rows))
    assert np.array_equal(np.sort(rows), source.rows)


@given(st.data())
@settings(max_examples=40)
def test_a_range_of_positions_is_that_part_of_the_epoch(data: st.DataObject) -> None:
    source = text_source("ranges", 60_000, block_rows=data.draw(st.sampled_from([50, 250, 7_000])))
    order = EpochOrder(source, 5, 1)
    first = data.draw(st.integers(0, 60_000))
    last = data.draw(st.integers(first, 60_000))
    assert np.array_equal(order.rows(0, first, last), order.rows(0, 0, 60_000)[first:last])


@given(sources(), seeds, st.integers(0, 5))
@settings(max_examples=100)
def test_the_position_of_a_row_is_where_it_is_drawn(source: ArraySource, seed: int, epoch: int) -> None:
    order = EpochOrder(source, seed, 1)
    rows = order.rows(epoch, 0, order.samples).tolist()
    assert [order.position(epoch, row) for row in rows] == list(range(order.samples))
    assert all(order.position(epoch, row) is None for row in range(max(rows) + 2) if row not in rows)


@pytest.mark.parametrize("block_rows", [50, 250, 7_000])
def test_the_position_of_a_row_is_found_in_many_groups(block_rows: int) -> None:
    source = text_source("many", 60_000, np.random.RandomState(0).rand(60_000) < 0.9, block_rows)
    order = EpochOrder(source, 5, 1)
    for position, row in list(enumerate(order.rows(1, 0, order.samples).tolist()))[::997]:
        assert order.position(1, row) == position


@given(sources(), seeds, st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=100)
def test_draws_are_the_epochs_one_after_the_other(source: ArraySource, seed: int, first: int, count: int) -> None:
    order = EpochOrder(source, seed, 1)
    epochs, rows = order.draws(first, first + count)
    fresh = EpochOrder(source, seed, 1)
    walked = [(epoch, row) for epoch in range(first + count) for row in fresh.rows(epoch, 0, fresh.samples).tolist()][first : first + count]
    assert list(zip(epochs.tolist(), rows.tolist(), strict=True)) == walked


@given(st.data())
@settings(max_examples=40)
def test_removing_samples_leaves_the_relative_order_of_all_others(data: st.DataObject) -> None:
    samples, block_rows = 40_000, data.draw(st.sampled_from([30, 100, 250]))
    removed = np.random.RandomState(data.draw(st.integers(0, 2**32 - 1))).choice(samples, data.draw(st.integers(1, 4_000)), replace=False)
    keep = np.ones(samples, bool)
    keep[removed] = False
    whole, less = text_source("s", samples, None, block_rows), text_source("s", samples, keep, block_rows)
    assume(group_blocks(whole.block_starts) == group_blocks(less.block_starts))
    before = EpochOrder(whole, 3, 1).rows(1, 0, samples)
    after = EpochOrder(less, 3, 1).rows(1, 0, int(keep.sum()))
    assert np.array_equal(before[keep[before]], after)


def test_orders_differ_between_epochs_sources_and_seeds() -> None:
    source = text_source("s", 5_000)
    orders = [
        EpochOrder(source, seed, number).rows(epoch, 0, 5_000) for seed, number, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert all(np.mean(a == b) < 0.01 for i, a in enumerate(orders) for b in orders[:i])


def test_a_group_mixes_its_blocks() -> None:
    """Neighbours in the order come from all over a group of 64 blocks, and the groups from all over the source."""
    rows = EpochOrder(text_source("s", 1_000_000), 0, 0).rows(0, 0, 16_000)
    assert len(np.unique(rows[:1_000] // 250)) > 110
    assert len(np.unique(rows // 250)) == 128
    assert np.ptp(rows) > 900_000


@pytest.mark.parametrize(("kept_share", "least"), [(1.0, 16_384), (0.01, 16_384)])
def test_a_group_has_blocks_for_16k_kept_samples(kept_share: float, least: int) -> None:
    source = text_source("s", 4_000_000, np.random.RandomState(0).rand(4_000_000) < kept_share)
    mean = group_blocks(source.block_starts) * len(source.rows) / 16_000
    assert least <= mean <= 2 * least


def test_only_two_block_tables_are_held() -> None:
    order = EpochOrder(text_source("s", 1_000), 0, 0)
    order.draws(0, 5_000)
    assert sorted(order._tables) == [3, 4]


def test_splitmix64_is_the_published_one() -> None:
    golden = np.array([1234567], np.uint64) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(golden).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_is_pinned() -> None:
    """Where this fails on purpose, raise PLANNER_VERSION."""
    order = EpochOrder(text_source("s", 10**5), 0, 0)
    assert order.rows(3, 50_000, 50_006).tolist() == [72476, 87955, 88544, 40360, 33076, 29975]
