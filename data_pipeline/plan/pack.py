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

    bins = _OpenBins(budgets.tokens, smallest=int(tokens.min()))
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
            full, rest = divmod(min(count, each * len(ids)), each)
            count -= full * each + rest
            partly = [ids.pop()] if rest else []
            for taken, held in ((ids, each), (partly, rest)):
                if taken:
                    placed += taken * held
                    bins.put((room[0] - held * piece_tokens, room[1] - held * piece_images, room[2] - held), taken)
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
    """Bins with room, grouped by what they have left; a max-tree over images left finds the best fit in O(log tokens)."""

    def __init__(self, tokens: int, smallest: int) -> None:
        """`tokens`: the most a bin can have left; bins with less than `smallest` left are never asked for and dropped."""
        self.leaves = 1 << tokens.bit_length()
        self.most_images = [-1] * (2 * self.leaves)
        self.groups: dict[int, dict[Room, list[int]]] = {}
        self.smallest = smallest

    def best(self, tokens: int, images: int) -> Room | None:
        """The fullest room that a piece of this size fits into, or None."""
        most = self.most_images
        node = self.leaves + tokens
        if most[node] < images:
            while node & 1 or most[node + 1] < images:
                node >>= 1
                if node <= 1:
                    return None
            node += 1
            while node < self.leaves:
                node <<= 1
                if most[node] < images:
                    node += 1
        group = self.groups[node - self.leaves]
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
        if room[1] == self.most_images[self.leaves + room[0]]:
            self._update(room[0], max([left[1] for left in group], default=-1))
        return ids

    def put(self, room: Room, ids: list[int]) -> None:
        """Add bins that have this much left."""
        if room[0] < self.smallest or room[2] == 0:
            return
        group = self.groups.setdefault(room[0], {})
        if room in group:
            group[room] += ids
            return
        group[room] = ids
        if room[1] > self.most_images[self.leaves + room[0]]:
            self._update(room[0], room[1])

    def _update(self, tokens: int, most: int) -> None:
        tree = self.most_images
        node = self.leaves + tokens
        while node and tree[node] != most:
            tree[node] = most
            beside = tree[node ^ 1]
            most = beside if beside > most else most
            node >>= 1
