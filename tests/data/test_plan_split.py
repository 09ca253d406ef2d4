"""Promises of `data_pipeline.plan.split`: pieces are the sample, each fits alone, no image is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import POLICY, element_records, samples

from data_pipeline.plan.columns import Budgets
from data_pipeline.plan.split import Pieces, split

budgets = st.builds(Budgets, tokens=st.integers(20, 100), images=st.integers(1, 4), segments=st.just(1))
held = st.lists(samples, max_size=12)


def cut(sample_lengths: list[list[int]], limits: Budgets, overhead: int) -> Pieces:
    counts = np.array([len(sample) for sample in sample_lengths], np.int64)
    records = element_records([length for sample in sample_lengths for length in sample])
    number = np.arange(len(counts))
    return split(7, number * 10, number + 100, counts, records, limits, POLICY, overhead)


@given(held, budgets, st.integers(0, 4))
@settings(max_examples=300)
def test_the_pieces_of_a_sample_are_exactly_the_sample(sample_lengths: list[list[int]], limits: Budgets, overhead: int) -> None:
    pieces = cut(sample_lengths, limits, overhead)
    found: list[int] = []
    place = (0, 0)
    for i in range(len(pieces)):
        assert (pieces.start_element[i], pieces.start_offset[i]) == place
        place = (int(pieces.end_element[i]), int(pieces.end_offset[i]))
        sample = int(pieces.row[i]) - 100
        assert pieces.epoch[i] == sample * 10
        assert pieces.source[i] == 7
        if pieces.last[i]:
            assert place == (len(sample_lengths[sample]), 0)
            found.append(sample)
            place = (0, 0)
        else:
            assert place[0] < len(sample_lengths[sample])
    assert found == list(range(len(sample_lengths)))


@given(held, budgets, st.integers(0, 4))
@settings(max_examples=300)
def test_a_piece_counts_what_it_holds_and_fits_alone(sample_lengths: list[list[int]], limits: Budgets, overhead: int) -> None:
    pieces = cut(sample_lengths, limits, overhead)
    for i in range(len(pieces)):
        elements = sample_lengths[pieces.row[i] - 100][pieces.start_element[i] : pieces.end_element[i]]
        tokens = sum(POLICY.tokens if length < 0 else length for length in elements) + pieces.end_offset[i] - pieces.start_offset[i]
        assert pieces.tokens[i] == tokens + overhead <= limits.tokens
        assert pieces.images[i] == sum(length < 0 for length in elements) <= limits.images


@given(held, budgets, st.integers(0, 4))
@settings(max_examples=300)
def test_no_image_is_cut_and_a_text_only_where_it_is_longer_than_any_piece(
    sample_lengths: list[list[int]], limits: Budgets, overhead: int
) -> None:
    pieces = cut(sample_lengths, limits, overhead)
    for i in np.flatnonzero(pieces.end_offset):
        assert sample_lengths[pieces.row[i] - 100][pieces.end_element[i]] > limits.tokens - overhead
        assert pieces.tokens[i] == limits.tokens


@given(held, budgets, st.integers(0, 4))
@settings(max_examples=300)
def test_pieces_are_greedy(sample_lengths: list[list[int]], limits: Budgets, overhead: int) -> None:
    pieces = cut(sample_lengths, limits, overhead)
    for i in np.flatnonzero(~pieces.last & (pieces.end_offset == 0)):
        after = sample_lengths[pieces.row[i] - 100][pieces.end_element[i]]
        if after < 0:
            assert pieces.tokens[i] + POLICY.tokens > limits.tokens or pieces.images[i] == limits.images
        else:
            assert pieces.tokens[i] + after > limits.tokens
            assert after <= limits.tokens - overhead or pieces.tokens[i] == limits.tokens


def test_a_long_text_fills_the_piece_before_it() -> None:
    pieces = cut([[-1, 100, 3]], Budgets(52, 4, 1), 2)
    assert list(zip(pieces.end_element.tolist(), pieces.end_offset.tolist(), strict=True)) == [(1, 34), (1, 84), (3, 0)]
    assert pieces.tokens.tolist() == [52, 52, 21]


def test_an_image_that_fits_no_piece_is_named() -> None:
    with pytest.raises(ValueError, match=r"row 101, element 1: an image of 640 x 480 pixels takes 16 tokens"):
        cut([[5], [5, -1]], Budgets(17, 4, 1), 2)
    with pytest.raises(ValueError, match=r"row 100, element 0: .* 0 tiles"):
        cut([[-1]], Budgets(64, 0, 1), 2)


def test_template_tokens_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        cut([[5]], Budgets(2, 4, 1), 2)
