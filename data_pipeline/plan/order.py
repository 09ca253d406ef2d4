"""Epoch order of one source.

Invariant: the order of an epoch is a pure function of (seed, source, epoch, kept rows), each epoch holds every kept row once,
and a position is found without walking to it. Blocks are physical and keys hash rows, so removing samples leaves the relative
order of all others as it was.
"""

import numpy as np

from data_pipeline.plan.columns import PlanSource

GROUP_SAMPLES = 16_384
"""Kept samples that a shuffle group holds at least, on average."""

BLOCK_KEY, ROW_KEY, PACK_KEY = 1, 2, 3
"""What a hash is for; the first word of its key."""

_WORD = (1 << 64) - 1
_INDEX_MASK = np.uint64((1 << 32) - 1)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The output of Steele, Lea and Flood's SplitMix64 (OOPSLA 2014) from state `x`; uint64 in, uint64 out, elementwise."""
    z = np.atleast_1d(np.asarray(x, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def keyed_hash(words: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """uint64 hash of each of `values` (non-negative integers) under a key of integers, each taken modulo 2**64."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = splitmix64(key ^ np.uint64(word & _WORD))
    return splitmix64(key ^ values.astype(np.uint64))


def sorting_permutation(keys: np.ndarray) -> np.ndarray:
    """int64 indices that sort uint64 `keys` by their upper half, ties by index: one sort of packed words, no argsort."""
    packed = (keys & ~_INDEX_MASK) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed & _INDEX_MASK).astype(np.int64)


def group_blocks(block_starts: np.ndarray) -> int:
    """Blocks of a shuffle group: the smallest power of two that holds GROUP_SAMPLES kept samples on average.

    A power of two, so that removing samples almost never changes it; when it does, all orders of the source change.
    """
    blocks, samples = len(block_starts) - 1, int(block_starts[-1])
    size = 1
    while size < blocks and size * samples < GROUP_SAMPLES * blocks:
        size *= 2
    return size


class EpochOrder:
    """The order in which a source's kept samples are drawn, epoch after epoch.

    Physical blocks are permuted, and the samples of each group of neighbours in that permutation are permuted among themselves.
    The only state is a cache of the block tables of two epochs.
    """

    def __init__(self, source: PlanSource, seed: int, source_id: int) -> None:
        self.samples = int(source.block_starts[-1])
        self._source = source
        self._key = (seed, source_id)
        self._group_blocks = group_blocks(source.block_starts)
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, rows), int64 each, of the draws [first, last) counted from the start of the first epoch."""
        epochs, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while first < last:
            epoch, position = divmod(first, self.samples)
            count = min(last - first, self.samples - position)
            epochs.append(np.full(count, epoch, np.int64))
            rows.append(self.rows(epoch, position, position + count))
            first += count
        return np.concatenate(epochs), np.concatenate(rows)

    def rows(self, epoch: int, first: int, last: int) -> np.ndarray:
        """int64 rows at the positions [first, last) of an epoch."""
        if not 0 <= first <= last <= self.samples:
            raise ValueError(f"positions [{first}, {last}) of an epoch of {self.samples} samples")
        if first == last:
            return np.empty(0, np.int64)
        blocks, group_starts = self._table(epoch)
        first_group = int(np.searchsorted(group_starts, first, "right")) - 1
        last_group = int(np.searchsorted(group_starts, last, "left"))
        groups = [self._group(epoch, blocks[g * self._group_blocks : (g + 1) * self._group_blocks]) for g in range(first_group, last_group)]
        skipped = int(group_starts[first_group])
        return np.concatenate(groups)[first - skipped : last - skipped]

    def position(self, epoch: int, row: int) -> int | None:
        """The position of a row in an epoch; None where the row is not kept."""
        ordinal = self._ordinal(row)
        if ordinal is None:
            return None
        blocks, group_starts = self._table(epoch)
        block = int(np.searchsorted(self._source.block_starts, ordinal, "right")) - 1
        group = int(np.flatnonzero(blocks == block)[0]) // self._group_blocks
        rows = self._group(epoch, blocks[group * self._group_blocks : (group + 1) * self._group_blocks])
        return int(group_starts[group]) + int(np.flatnonzero(rows == row)[0])

    def _ordinal(self, row: int) -> int | None:
        """The place of a row among the kept ones."""
        first, last = 0, self.samples
        while first < last:
            middle = (first + last) // 2
            found = int(self._source.kept(middle, middle + 1)[0])
            if found == row:
                return middle
            first, last = (middle + 1, last) if found < row else (first, middle)
        return None

    def _group(self, epoch: int, blocks: np.ndarray) -> np.ndarray:
        """Rows of a group, permuted. Blocks that touch are one run."""
        blocks = np.sort(blocks)
        starts, ends = self._source.block_starts[blocks], self._source.block_starts[blocks + 1]
        gaps = np.flatnonzero(starts[1:] != ends[:-1])
        rows = self._source.kept_runs(starts[np.append(0, gaps + 1)], ends[np.append(gaps, len(ends) - 1)])
        return rows[sorting_permutation(keyed_hash((ROW_KEY, *self._key, epoch), rows))]

    def _table(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in the epoch's order uint32 [B], first position of each group int64 [groups + 1])."""
        table = self._tables.get(epoch)
        if table is None:
            counts = np.diff(self._source.block_starts)
            blocks = sorting_permutation(keyed_hash((BLOCK_KEY, *self._key, epoch), np.arange(len(counts)))).astype(np.uint32)
            sizes = np.add.reduceat(counts[blocks], np.arange(0, len(counts), self._group_blocks))
            table = blocks, np.concatenate([[0], np.cumsum(sizes)])
            self._tables = {**dict(list(self._tables.items())[-1:]), epoch: table}
        return table
