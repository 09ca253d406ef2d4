"""Promises of `data_pipeline.plan.pack`: no budget exceeded, and the fill of best fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import peers_mix

from data_pipeline.plan.columns import Budgets, ImagePolicy
from data_pipeline.plan.pack import pack
from data_pipeline.plan.split import Pieces, split

budgets = st.builds(Budgets, tokens=st.integers(10, 40), images=st.integers(0, 6), segments=st.integers(1, 6))


@st.composite
def packings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Budgets]:
    limits = draw(budgets)
    piece = st.tuples(st.integers(0, limits.tokens), st.integers(0, limits.images))
    drawn = draw(st.lists(st.one_of(piece, st.sampled_from(draw(st.lists(piece, min_size=1, max_size=3)))), max_size=60))
    tokens, images = np.array(drawn, np.int32).reshape(-1, 2).T
    return tokens, images, limits


def used(tokens: np.ndarray, images: np.ndarray, packs: np.ndarray) -> list[tuple[int, int, int]]:
    """What each pack uses of its budgets; which of two equally full packs takes a piece is nobody's concern."""
    counts = np.bincount(packs)
    return sorted(zip(np.bincount(packs, tokens).tolist(), np.bincount(packs, images).tolist(), counts.tolist(), strict=True))


def best_fit_item_by_item(tokens: np.ndarray, images: np.ndarray, limits: Budgets) -> np.ndarray:
    """The reference: largest first, each into the open pack that it leaves the least room in."""
    left: list[list[int]] = []
    packs = np.empty(len(tokens), np.int64)
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], -images[i])):
        size = (int(tokens[i]), int(images[i]), 1)
        fitting = [b for b, room in enumerate(left) if all(r >= s for r, s in zip(room, size, strict=True))]
        if not fitting:
            left.append([limits.tokens, limits.images, limits.segments])
        packs[i] = min(fitting, key=lambda b: left[b]) if fitting else len(left) - 1
        left[packs[i]] = [r - s for r, s in zip(left[packs[i]], size, strict=True)]
    return packs


@given(packings())
@settings(max_examples=300)
def test_every_piece_is_in_one_pack_and_no_pack_is_over_a_budget(packing: tuple[np.ndarray, np.ndarray, Budgets]) -> None:
    tokens, images, limits = packing
    packs = pack(tokens, images, limits)
    assert np.array_equal(np.unique(packs), np.arange(packs.max(initial=-1) + 1))
    assert len(packs) == len(tokens)
    assert np.bincount(packs, tokens).max(initial=0) <= limits.tokens
    assert np.bincount(packs, images).max(initial=0) <= limits.images
    assert np.bincount(packs).max(initial=0) <= limits.segments


@given(packings())
@settings(max_examples=300)
def test_runs_are_packed_as_item_by_item_best_fit_would(packing: tuple[np.ndarray, np.ndarray, Budgets]) -> None:
    tokens, images, limits = packing
    reference = best_fit_item_by_item(tokens, images, limits)
    assert used(tokens, images, pack(tokens, images, limits)) == used(tokens, images, reference)


def peers_pieces() -> tuple[Pieces, Budgets]:
    source, limits = peers_mix(4 * 65_536), Budgets(4096, 64, 256)
    counts, elements = source.elements(source.rows)
    return split(0, np.zeros_like(source.rows), source.rows, counts, elements, limits, ImagePolicy(1225), 2), limits


def test_the_fill_of_a_window_is_within_1_percent_of_unlimited() -> None:
    pieces, limits = peers_pieces()

    def fill(part: Pieces) -> float:
        return part.tokens.sum() / (pack(part.tokens, part.images, limits).max() + 1) / limits.tokens

    assert fill(pieces.take(pieces.row < 65_536)) > 0.99 * fill(pieces)


def test_the_fill_does_not_suffer_from_the_order_of_the_pieces() -> None:
    pieces, limits = peers_pieces()
    shuffled = pieces.take(np.random.RandomState(0).permutation(len(pieces)))
    assert pack(pieces.tokens, pieces.images, limits).max() == pack(shuffled.tokens, shuffled.images, limits).max()


@pytest.mark.parametrize(("tokens", "images", "segments"), [(11, 0, 5), (5, 3, 5), (5, 0, 0)])
def test_a_piece_over_a_budget_is_refused(tokens: int, images: int, segments: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.array([tokens]), np.array([images]), Budgets(10, 2, segments))
