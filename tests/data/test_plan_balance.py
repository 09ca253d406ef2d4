"""Promises of `data_pipeline.plan.balance`: every pack once, equal micro-steps, loads that differ by little."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan.balance import EMPTY, CostModel, assign, cost

costs_lists = st.lists(st.integers(0, 10**12), max_size=60)
ranks_counts, micro_counts = st.integers(1, 9), st.integers(1, 4)


@given(costs_lists, ranks_counts, micro_counts, st.integers(0, 40))
@settings(max_examples=300)
def test_every_pack_has_one_place_and_every_rank_the_same_micro_steps(costs: list[int], ranks: int, micro: int, missing: int) -> None:
    global_batch = len(costs) + missing
    table = assign(np.array(costs, np.int64), ranks, micro, global_batch)
    assert table.shape == (-(-global_batch // (ranks * micro)), ranks, micro)
    assert sorted(table[table != EMPTY].tolist()) == list(range(len(costs)))


@given(costs_lists, ranks_counts, micro_counts)
@settings(max_examples=300)
def test_loads_differ_by_no_more_than_neighbours_in_cost(costs: list[int], ranks: int, micro: int) -> None:
    table = assign(np.array(costs, np.int64), ranks, micro)
    loads = np.array([*costs, 0], np.int64)[table].sum(axis=(0, 2))
    dealt = np.zeros(table.size, np.int64)
    dealt[: len(costs)] = sorted(costs, reverse=True)
    neighbours = np.ptp(dealt.reshape(-1, ranks), axis=1)
    assert np.ptp(loads) <= neighbours.max(initial=0)


@given(costs_lists, ranks_counts, micro_counts)
@settings(max_examples=300)
def test_a_micro_step_holds_neighbours_in_cost(costs: list[int], ranks: int, micro: int) -> None:
    table = assign(np.array(costs, np.int64), ranks, micro)
    held = [np.array([*costs, 0], np.int64)[step].ravel() for step in table]
    assert all(before.min() >= after.max() for before, after in itertools.pairwise(held))


def test_ties_go_by_index_and_the_largest_to_the_least_loaded() -> None:
    assert assign(np.array([5, 9, 5, 5]), 2, 1).tolist() == [[[1], [0]], [[3], [2]]]
    assert assign(np.array([5, 5, 5]), 2, 2, 8).tolist() == [[[0, 2], [1, EMPTY]], [[EMPTY, EMPTY], [EMPTY, EMPTY]]]


def test_more_packs_than_the_global_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="5 packs in a global batch of 4"):
        assign(np.zeros(5, np.int64), 2, 1, 4)


def test_the_cost_of_a_pack_is_linear_in_tokens_and_images_and_quadratic_in_segments() -> None:
    found = cost(np.array([3, 4, 10], np.int32), np.array([1, 0, 2], np.int32), np.array([0, 2, 2, 3]), CostModel(100, 10, 1))
    assert found.tolist() == [700 + 250 + 1, 0, 1000 + 1000 + 2]


def test_costs_of_long_segments_do_not_overflow() -> None:
    found = cost(np.array([131_072], np.int32), np.array([0], np.int32), np.array([0, 1]), CostModel(10**11, 10**6, 10**9))
    assert found.tolist() == [10**11 * 131_072 + 10**6 * 131_072**2]
