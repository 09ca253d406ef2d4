"""The plan: from a cursor to the packs of a global batch.

Invariant: a global batch is a pure function of its cursor and of what `Plan.digest` covers. World size, workers, timing and
unreadable samples do not enter, and no window needs another one to be computed first.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from threading import Lock

import numpy as np

from data_pipeline.plan import mix
from data_pipeline.plan.columns import Budgets, ImagePolicy, PlanSource
from data_pipeline.plan.order import PACK_KEY, EpochOrder, keyed_hash, sorting_permutation
from data_pipeline.plan.pack import pack
from data_pipeline.plan.split import Pieces, split

PLANNER_VERSION = 1
"""Raised by every change that moves a sample to another place."""

CACHED_WINDOWS = 2
"""The window that is consumed and the one planned ahead."""
FAR = 1 << 40
"""No run gets to this window: what it has not drawn by then is never drawn."""


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in the plan: the next pack to consume."""

    window: int
    pack: int


@dataclass(frozen=True)
class Window:
    """The draws that are packed together, as packs in the order in which they are consumed. May hold no pack."""

    index: int
    pieces: Pieces
    """Sorted by pack."""
    pack_starts: np.ndarray
    """int64 [P+1]: the piece at which each pack begins."""

    def __len__(self) -> int:
        return len(self.pack_starts) - 1

    def pack(self, i: int) -> Pieces:
        """The pieces of pack i."""
        return self.pieces.take(slice(int(self.pack_starts[i]), int(self.pack_starts[i + 1])))


@dataclass(frozen=True)
class GlobalBatch:
    """The packs of one optimizer step."""

    packs: list[Pieces]
    """As many as the global batch counts; fewer, or none, only at the end of the run."""
    cursor: Cursor
    """Where the next batch begins."""
    done: bool
    """No pack comes after this batch."""
    progress: float | None
    """Share of the planned windows that is done at `cursor`; None where the mix is endless."""


class Plan:
    """The packs of a whole run, computed a window at a time. May be shared by threads."""

    def __init__(
        self,
        sources: Sequence[PlanSource],
        weights: Sequence[Fraction],
        unit: str,
        budgets: Budgets,
        policy: ImagePolicy,
        overhead: Sequence[int],
        window: int,
        global_batch: int,
        seed: int,
        extra_digest: str = "",
    ) -> None:
        """`weights` and `overhead` (template tokens of a piece) are by source; `window` counts draws, `global_batch` packs.

        Raises ValueError for a mix that cannot be drawn or an image that fits no pack.
        """
        _check(sources, weights, budgets, policy, overhead, window, global_batch)
        sizes = [int(source.block_starts[-1]) for source in sources]
        mean_tokens = [
            Fraction(int(source.text_tokens) + int(source.images) * policy.tokens, max(1, size))
            for source, size in zip(sources, sizes, strict=True)
        ]
        self.draws = mix.window_draws(mix.shares(unit, weights, sizes, mean_tokens), sizes, window)
        """Draws of a window, on average."""
        self.rates = mix.rates(unit, weights, sizes, mean_tokens, self.draws)
        """Draws of each source a window."""
        self.windows = mix.epoch_windows(weights, sizes, self.draws) if unit == "epochs" else None
        """Windows of the run; None where the mix is endless."""
        self.repeats = {s.name: rate / size for s, rate, size in zip(sources, self.rates, sizes, strict=True) if rate > size}
        """Small sources that repeat inside a window, and how many epochs of theirs one holds."""
        self.digest = _digest(sources, weights, unit, budgets, policy, overhead, window, global_batch, seed, extra_digest)
        """Hexadecimal sha256 of all that the plan depends on."""
        self._sources, self._budgets, self._policy, self._overhead = list(sources), budgets, policy, list(overhead)
        self._batch_packs, self._seed = global_batch, seed
        self._orders = [EpochOrder(source, seed, source_id(source.name)) for source in sources]
        self._cache: dict[int, Window] = {}
        self._cache_lock, self._planning = Lock(), Lock()

    def window(self, w: int) -> Window:
        """Window w >= 0; IndexError past the end of the run."""
        if w < 0 or (self.windows is not None and w >= self.windows):
            raise IndexError(f"window {w} of {self.windows}")
        found = self._cached(w)
        if found is None:
            with self._planning:  # a cached window stays readable while another thread plans
                found = self._cached(w)
                if found is None:
                    found = self._plan_window(w)
                    self._keep(found)
        return found

    def global_batch(self, cursor: Cursor) -> GlobalBatch:
        """The batch that begins at `cursor`; without packs at the end of the run. ValueError for a cursor of another plan."""
        packs: list[Pieces] = []
        while True:
            cursor = self._skip_empty(cursor)
            if len(packs) == self._batch_packs or cursor.window == self.windows:
                break
            window = self.window(cursor.window)
            if cursor.pack > len(window):
                raise ValueError(f"{cursor} lies outside its window of {len(window)} packs: it belongs to another plan")
            end = min(len(window), cursor.pack + self._batch_packs - len(packs))
            packs += [window.pack(i) for i in range(cursor.pack, end)]
            cursor = Cursor(cursor.window, end) if end < len(window) else Cursor(cursor.window + 1, 0)
        return GlobalBatch(packs, cursor, done=cursor.window == self.windows, progress=self._progress(cursor))

    def first_window(self, source: int, row: int) -> int | None:
        """The window that first draws a row of a source; None where none does."""
        position = self._orders[source].position(0, row)
        if position is None:
            return None
        before, drawn = -1, 1  # the last window known to draw too little, the first known to draw enough
        while self._quotas(drawn)[source][1] <= position:
            if drawn >= (self.windows or FAR):
                return None
            before, drawn = drawn, 2 * drawn
        while drawn - before > 1:
            middle = (before + drawn) // 2
            before, drawn = (middle, drawn) if self._quotas(middle)[source][1] <= position else (before, middle)
        return drawn if self.windows is None or drawn < self.windows else None

    def _skip_empty(self, cursor: Cursor) -> Cursor:
        """The same place, past windows that draw nothing."""
        while cursor.pack == 0 and cursor.window != self.windows and not any(a < b for a, b in self._quotas(cursor.window)):
            cursor = Cursor(cursor.window + 1, 0)
        return cursor

    def _progress(self, cursor: Cursor) -> float | None:
        if self.windows is None:
            return None
        packs = len(self.window(cursor.window)) if cursor.pack else 1
        return (cursor.window * packs + cursor.pack) / (self.windows * packs)

    def _quotas(self, w: int) -> list[tuple[int, int]]:
        """The draws [first, last) of each source in window w."""
        return [(mix.quota(rate, w), mix.quota(rate, w + 1)) for rate in self.rates]

    def _cached(self, w: int) -> Window | None:
        with self._cache_lock:
            found = self._cache.pop(w, None)
            if found is not None:
                self._cache[w] = found
            return found

    def _keep(self, window: Window) -> None:
        with self._cache_lock:
            self._cache[window.index] = window
            while len(self._cache) > CACHED_WINDOWS:
                self._cache.pop(next(iter(self._cache)))

    def _plan_window(self, w: int) -> Window:
        pieces = Pieces.concatenate([self._draw(source, *quota) for source, quota in enumerate(self._quotas(w))])
        packs = pack(pieces.tokens, pieces.images, self._budgets)
        count = int(packs.max(initial=-1)) + 1
        place = np.empty(count, np.int64)
        place[sorting_permutation(keyed_hash((PACK_KEY, self._seed, w), np.arange(count)))] = np.arange(count)
        places = place[packs]
        starts = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=count))])
        by_pack = sorting_permutation(places.astype(np.uint64) << np.uint64(32))
        return Window(w, pieces.take(by_pack), starts)

    def _draw(self, source: int, first: int, last: int) -> Pieces:
        """Pieces of the draws [first, last) of a source."""
        epochs, rows = self._orders[source].draws(first, last)
        counts, elements = self._sources[source].elements(rows)
        try:
            return split(source, epochs, rows, counts, elements, self._budgets, self._policy, self._overhead[source])
        except ValueError as error:
            raise ValueError(f"source {self._sources[source].name!r}: {error}") from error


def source_id(name: str) -> int:
    """A source's number in hashes: from its name, so that adding or reordering sources leaves the order inside each."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _check(
    sources: Sequence[PlanSource],
    weights: Sequence[Fraction],
    budgets: Budgets,
    policy: ImagePolicy,
    overhead: Sequence[int],
    window: int,
    global_batch: int,
) -> None:
    """Raises ValueError for what a user can get wrong and the plan would otherwise find late, or not at all."""
    if not len(sources) == len(weights) == len(overhead):
        raise ValueError(f"{len(sources)} sources, {len(weights)} weights, {len(overhead)} overheads")
    if len({source.name for source in sources}) < len(sources):
        raise ValueError("two sources have the same name")
    if min(window, global_batch, budgets.tokens, budgets.segments) < 1 or budgets.images < 0:
        raise ValueError(f"window {window}, global batch {global_batch}, {budgets}: all but images must be at least 1")
    for source, weight, extra in zip(sources, weights, overhead, strict=True):
        if weight > 0 and source.block_starts[-1] == 0:
            raise ValueError(f"source {source.name!r} has a weight but no kept sample")
        if weight > 0 and source.images and (policy.tokens + extra > budgets.tokens or budgets.images < 1):
            raise ValueError(
                f"source {source.name!r}: an image of {policy.tokens} tokens with {extra} template tokens fits no pack of {budgets}"
            )


def _digest(
    sources: Sequence[PlanSource],
    weights: Sequence[Fraction],
    unit: str,
    budgets: Budgets,
    policy: ImagePolicy,
    overhead: Sequence[int],
    window: int,
    global_batch: int,
    seed: int,
    extra_digest: str,
) -> str:
    ingredients = {
        "planner": PLANNER_VERSION,
        "sources": [[source.name, source.digest] for source in sources],
        "weights": [str(weight) for weight in weights],
        "unit": unit,
        "budgets": asdict(budgets),
        "policy": {type(policy).__name__: asdict(policy)},
        "overhead": [int(extra) for extra in overhead],
        "window": window,
        "global_batch": global_batch,
        "seed": seed,
        "extra": extra_digest,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
