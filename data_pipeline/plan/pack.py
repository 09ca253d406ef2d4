"""Pieces into packs: best fit, largest first.

Invariant: every piece is in one pack, no pack is over its token, image or segment budget, and the result depends on nothing but
the columns.

Pieces of equal (tokens, images) are one run and packs of equal (tokens, images and segments left) one group; a run meets a group
in one step, which is what item-by-item best fit would do to them one after the other.
"""

import numpy as np

from data_pipeline.plan.columns import Budgets
from data_pipeline.plan.order import sorting_permutation

_LARGEST = np.uint64((1 << 32) - 1)
_SHIFT = 6
_WORD = 1 << _SHIFT


def pack(tokens: np.ndarray, images: np.ndarray, budgets: Budgets) -> np.ndarray:
    """int64 pack of each piece; packs are numbered from 0 in the order in which they are opened.

    Best fit means fewest tokens left, then fewest images, then fewest segments. Raises ValueError for a piece over a budget.
    """
    if len(tokens) == 0:
        return np.empty(0, np.int64)
    if tokens.max() > budgets.tokens or images.max() > budgets.images or budgets.segments < 1:
        raise ValueError(f"a piece of up to {tokens.max()} tokens and {images.max()} images does not fit {budgets}")
    size = tokens.astype(np.uint64) * np.uint64(images.max() + 1) + images.astype(np.uint64)
    if size.max() > _LARGEST:
        raise ValueError(f"pieces of {tokens.max()} tokens and {images.max()} images are too large to be sorted")
    order = sorting_permutation((_LARGEST - size) << np.uint64(32))
    starts = np.flatnonzero(np.append(True, np.diff(size[order])))
    counts = np.diff(starts, append=len(order))
    runs = zip(tokens[order[starts]].tolist(), images[order[starts]].tolist(), counts.tolist(), strict=True)

    bins = _OpenBins(budgets, images, smallest=int(tokens.min()))
    placed: list[int] = []
    opened, fresh = 0, (budgets.tokens, budgets.images, budgets.segments)
    for piece_tokens, piece_images, count in runs:
        while count:
            room = bins.best(piece_tokens, piece_images) or fresh
            each = _capacity(room, piece_tokens, piece_images) if count > 1 else 1
            wanted = -(-count // each)
            if room is fresh:
                ids = list(range(opened, opened + wanted))
                opened += wanted
            else:
                ids = bins.take(room, wanted)
            held = min(count, each * len(ids))
            count -= held
            rest = held % each
            if rest:
                last = [ids.pop()]
                bins.put((room[0] - rest * piece_tokens, room[1] - rest * piece_images, room[2] - rest), last)
            if ids:
                placed += ids * each if each > 1 else ids
                bins.put((room[0] - each * piece_tokens, room[1] - each * piece_images, room[2] - each), ids)
            if rest:
                placed += last * rest
    packs = np.empty(len(order), np.int64)
    packs[order] = np.fromiter(placed, np.int64, len(placed))
    return packs


Room = tuple[int, int, int]
"""(tokens, images, segments) that a bin has left."""


def _capacity(room: Room, tokens: int, images: int) -> int:
    """Pieces of one size that fit into a bin."""
    capacity = room[2]
    if tokens:
        capacity = min(capacity, room[0] // tokens)
    if images:
        capacity = min(capacity, room[1] // images)
    return capacity


class _OpenBins:
    """Bins with room, grouped by what they have left.

    For every number of images that a piece has, the numbers of tokens left of the bins with room for them are a set of bits, in words
    of `_WORD` and one more word that says which are not zero: the best fit is the lowest bit from a place on.
    """

    def __init__(self, budgets: Budgets, images: np.ndarray, smallest: int) -> None:
        """`images`: the sizes [n] in images that will be asked for; bins with fewer than `smallest` tokens left never are."""
        asked = np.unique(images).tolist()
        self.words = [[0] * ((budgets.tokens >> _SHIFT) + 2) for _ in asked]
        self.words_of = dict(zip(asked, self.words, strict=True))
        self.asked_below = np.searchsorted(asked, np.arange(1 + budgets.images), "right").tolist()
        """By images left: how many of the sizes asked for fit."""
        self.fitting = [0] * (budgets.tokens + 1)
        """By tokens left: how many of the sizes fit into the bin with the most images left."""
        self.groups: dict[int, dict[Room, list[int]]] = {}
        self.smallest = smallest

    def best(self, tokens: int, images: int) -> Room | None:
        """The fullest room that a piece of this size fits into, or None."""
        words, place = self.words_of[images], tokens >> _SHIFT
        found = words[place] >> (tokens & _WORD - 1)
        if found:
            left = tokens + (found & -found).bit_length() - 1
        else:
            later = words[-1] >> place + 1
            if not later:
                return None
            place += (later & -later).bit_length()
            found = words[place]
            left = (place << _SHIFT) + (found & -found).bit_length() - 1
        group = self.groups[left]
        return min(group if len(group) == 1 else [room for room in group if room[1] >= images])

    def take(self, room: Room, wanted: int) -> list[int]:
        """Remove and return up to `wanted` of the bins that have exactly this much left, the youngest."""
        group = self.groups[room[0]]
        ids = group[room]
        if wanted < len(ids):
            taken = ids[-wanted:]
            del ids[-wanted:]
            return taken
        del group[room]
        before = self.fitting[room[0]]
        if self.asked_below[room[1]] == before:
            after = self.asked_below[max([left[1] for left in group])] if group else 0
            if after == before:
                return ids
            place, bit = room[0] >> _SHIFT, 1 << (room[0] & _WORD - 1)
            for words in self.words[after:before]:
                words[place] ^= bit
                if not words[place]:
                    words[-1] ^= 1 << place
            self.fitting[room[0]] = after
        return ids

    def put(self, room: Room, ids: list[int]) -> None:
        """Add bins that have this much left."""
        if room[0] < self.smallest or room[2] == 0:
            return
        group = self.groups.get(room[0])
        if group is None:
            group = self.groups[room[0]] = {}
        elif room in group:
            group[room] += ids
            return
        group[room] = ids
        before, after = self.fitting[room[0]], self.asked_below[room[1]]
        if after > before:
            place, bit = room[0] >> _SHIFT, 1 << (room[0] & _WORD - 1)
            for words in self.words[before:after]:
                words[place] |= bit
                words[-1] |= 1 << place
            self.fitting[room[0]] = after
