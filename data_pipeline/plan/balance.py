"""Packs of one global batch onto data-parallel ranks and micro-steps.

Invariant: every pack has one place, every rank runs the same number of micro-steps, and the loads of two ranks differ by no more
than the costs of two packs that are neighbours in cost. Integers only, ties by index: all ranks compute the same table.
"""

from dataclasses import dataclass

import numpy as np

EMPTY = -1
"""The place of an empty pack."""


@dataclass(frozen=True)
class CostModel:
    """What a pack costs, in any integer unit (FLOPs, say)."""

    token: int
    """Cost of one token."""
    attention: int
    """Cost of one pair of tokens of a segment."""
    image: int
    """Cost of one tile."""


def cost(tokens: np.ndarray, images: np.ndarray, pack_starts: np.ndarray, model: CostModel) -> np.ndarray:
    """int64 [P] cost of each pack: tokens and images [n] of its segments, which begin at `pack_starts` [P+1]."""
    lengths = tokens.astype(np.int64)
    segments = model.token * lengths + model.attention * lengths**2 + model.image * images.astype(np.int64)
    before = np.concatenate([[0], np.cumsum(segments)])
    return np.diff(before[pack_starts])


def assign(costs: np.ndarray, ranks: int, micro_packs: int, global_batch: int | None = None) -> np.ndarray:
    """int64 [micro_steps, ranks, micro_packs]: the index of the pack at each place, or EMPTY.

    `global_batch` is the number of packs that fixes the micro-steps; a short last batch has fewer costs than that. Packs sorted
    by falling cost are dealt in rounds of one a rank, the largest to the rank with the least so far; `micro_packs` rounds are a
    micro-step, so that what runs in lock step costs alike.
    """
    packs = len(costs) if global_batch is None else global_batch
    if len(costs) > packs:
        raise ValueError(f"{len(costs)} packs in a global batch of {packs}")
    micro_steps = -(-packs // (ranks * micro_packs))
    places = np.full(micro_steps * micro_packs * ranks, EMPTY, np.int64)
    places[: len(costs)] = np.argsort(-costs, kind="stable")
    place_costs = np.zeros(len(places), np.int64)
    place_costs[: len(costs)] = costs[places[: len(costs)]]

    load = np.zeros(ranks, np.int64)
    table = np.empty((micro_steps * micro_packs, ranks), np.int64)
    for row, indices, dealt in zip(table, places.reshape(-1, ranks), place_costs.reshape(-1, ranks), strict=True):
        least_first = np.argsort(load, kind="stable")
        row[least_first] = indices
        load[least_first] += dealt
    return table.reshape(micro_steps, micro_packs, ranks).transpose(0, 2, 1).copy()
