"""The plan: from a cursor to the packs of a global batch.

Invariant: a global batch is a pure function of its cursor and of what `Plan.digest` covers. World size, workers, timing and
unreadable samples do not enter, and no window needs another one to be computed first.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from threading import Lock

import numpy as np

from data_pipeline.plan import mix, phases
from data_pipeline.plan.columns import Budgets, ImagePolicy, PlanSource
from data_pipeline.plan.order import PACK_KEY, EpochOrder, keyed_hash, sorting_permutation
from data_pipeline.plan.origin import Cursor, Drawn, Origin
from data_pipeline.plan.pack import pack
from data_pipeline.plan.phases import Phase, PlannedPhase, Quotas
from data_pipeline.plan.split import Pieces, split

PLANNER_VERSION = 1
"""Raised by every change that moves a sample to another place."""

CACHED_WINDOWS = 2
"""The window that is consumed and the one planned ahead."""
FAR = 1 << 40
"""No run gets to this window: what it has not drawn by then is never drawn."""

COUNTED_PACKS = 4096
"""Packs of a phase that are planned to learn how many a window holds, before the place of the next phase is extrapolated."""


@dataclass(frozen=True)
class Packs:
    """Packs in the order in which they are consumed; may be none."""

    pieces: Pieces
    """Sorted by pack."""
    pack_starts: np.ndarray
    """int64 [P+1]: the piece at which each pack begins."""

    def __len__(self) -> int:
        return len(self.pack_starts) - 1

    def pack(self, i: int) -> Pieces:
        """The pieces of pack i."""
        return self.pieces.take(slice(int(self.pack_starts[i]), int(self.pack_starts[i + 1])))

    def part(self, first: int, last: int) -> "Packs":
        """The packs [first, last)."""
        starts = self.pack_starts[first : last + 1]
        return Packs(self.pieces.take(slice(int(starts[0]), int(starts[-1]))), starts - starts[0])

    @classmethod
    def concatenate(cls, parts: Sequence["Packs"]) -> "Packs":
        """All packs of `parts`, in order; at least one part."""
        if len(parts) == 1:
            return parts[0]
        counts = np.concatenate([np.diff(part.pack_starts) for part in parts])
        return Packs(Pieces.concatenate([part.pieces for part in parts]), np.concatenate([[0], np.cumsum(counts)]))


@dataclass(frozen=True)
class Window(Packs):
    """The draws that are packed together."""

    index: int


@dataclass(frozen=True)
class GlobalBatch(Packs):
    """The packs of one optimizer step: as many as the global batch counts; fewer, or none, only at the end of the run."""

    cursor: Cursor
    """Where the next batch begins."""
    done: bool
    """No pack comes after this batch."""
    progress: float | None
    """Share of the planned windows that is done at `cursor`; None where the mix is endless."""

    @property
    def packs(self) -> list[Pieces]:
        """The pieces of each pack."""
        return [self.pack(i) for i in range(len(self))]


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
        later: Sequence[Phase] = (),
        steps: int | None = None,
        origin: Origin = Origin(),  # noqa: B008  frozen
    ) -> None:
        """`weights` and `overhead` (template tokens of a piece) are by source; `window` counts draws, `global_batch` packs.

        `later`: phases that follow the first; they need the run's length in `steps`, and begin at the first border of a window that
        has their share of the run's packs before it. The packs are counted up to COUNTED_PACKS a phase and extrapolated beyond.

        Raises ValueError for a mix that cannot be drawn, a phase that gets no window or an image that fits no pack.
        """
        phases.check(later, len(sources), unit, steps)
        drawn_weights = [max(w) for w in zip(weights, *(phase.weights for phase in later), strict=True)]
        _check(sources, drawn_weights, budgets, policy, overhead, window, global_batch)
        self.origin = origin
        """Where this plan takes over from another one; the start of the run, as a rule."""
        self.windows: int | None = None
        """Windows of the run; None where the mix is endless."""
        self.repeats: dict[str, Fraction] = {}
        """Small sources that repeat inside a window, and how many epochs of theirs one holds."""
        self._sources, self._unit, self._budgets, self._policy = list(sources), unit, budgets, policy
        self._overhead, self._draws, self._batch_packs, self._seed = list(overhead), window, global_batch, seed
        self._orders = [EpochOrder(source, seed, source_id(source.name)) for source in sources]
        self._image_tokens = [policy.total_tokens(source) if unit == "tokens" else Fraction(0) for source in sources]
        self._cache: dict[int, Window] = {}
        self._cache_lock, self._planning = Lock(), Lock()
        self._base = [origin.ordinals.get(source.name, 0) for source in sources]
        begun = [phase.weights for phase in later if steps is not None and phase.at * steps <= origin.step]
        self._drawn = Quotas(self._base, self._phase(origin.window, [tuple(weights), *begun][-1]))
        if unit == "epochs":
            sizes = [order.samples for order in self._orders]
            self.windows = origin.window + mix.epoch_windows(weights, sizes, self.phases[0].draws, self._base)
        if steps is not None:
            self._place(later[len(begun) :], steps)
        self.digest = _digest(self, weights, extra_digest)
        """Hexadecimal sha256 of all that the plan depends on."""

    @property
    def phases(self) -> list[PlannedPhase]:
        """Windows with constant rates; one phase, unless the mix changes."""
        return self._drawn.phases

    def window(self, w: int) -> Window:
        """Window w, counted from the start of the run; IndexError before the origin or past the end of the run."""
        if w < self.origin.window or (self.windows is not None and w >= self.windows):
            raise IndexError(f"window {w} of {self.origin.window} to {self.windows}")
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
        if cursor.window < self.origin.window:
            raise ValueError(f"{cursor} lies before window {self.origin.window}, where this plan takes over: it belongs to another plan")
        parts, wanted = [Packs(Pieces.none(), np.zeros(1, np.int64))], self._batch_packs
        while True:
            cursor = self._skip_empty(cursor)
            if wanted == 0 or cursor.window == self.windows:
                break
            window = self.window(cursor.window)
            if cursor.pack > len(window):
                raise ValueError(f"{cursor} lies outside its window of {len(window)} packs: it belongs to another plan")
            end = min(len(window), cursor.pack + wanted)
            if end > cursor.pack:
                parts.append(window.part(cursor.pack, end))
                wanted -= end - cursor.pack
            cursor = Cursor(cursor.window, end) if end < len(window) else Cursor(cursor.window + 1, 0)
        packs = Packs.concatenate(parts[1:] or parts)
        done = cursor.window == self.windows
        return GlobalBatch(packs.pieces, packs.pack_starts, cursor, done=done, progress=self._progress(cursor))

    def image_tokens(self, pieces: Pieces) -> np.ndarray:
        """int64 image tokens of each piece; reads the index of its sample."""
        found = np.zeros(len(pieces), np.int64)
        for s, source in enumerate(self._sources):
            mine = np.flatnonzero(pieces.source == s)
            counts, elements = source.elements(pieces.row[mine])
            before = np.concatenate([[0], np.cumsum(self._policy.image_tokens(elements))])
            starts = np.cumsum(counts) - counts
            found[mine] = before[starts + pieces.end_element[mine]] - before[starts + pieces.start_element[mine]]
        return found

    def drawn(self, cursor: Cursor) -> Drawn:
        """What a checkpoint at `cursor` keeps, so that another plan can take over there."""
        names = [source.name for source in self._sources]
        before, after = (
            {**self.origin.ordinals, **dict(zip(names, self._drawn.before(w), strict=True))} for w in (cursor.window, cursor.window + 1)
        )
        return Drawn(before, after, {source.name: source.digest for source in self._sources})

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
        return list(zip(self._drawn.before(w), self._drawn.before(w + 1), strict=True))

    def _phase(self, begin: int, weights: tuple[Fraction, ...]) -> PlannedPhase:
        """The rates of `weights` from window `begin` on."""
        sizes = [order.samples for order in self._orders]
        mean_tokens = [
            (int(source.text_tokens) + image_tokens) / max(1, size)
            for source, image_tokens, size in zip(self._sources, self._image_tokens, sizes, strict=True)
        ]
        shares = mix.shares(self._unit, weights, sizes, mean_tokens, self._base)
        draws = mix.window_draws(shares, sizes, self._draws)
        rates = mix.rates(self._unit, weights, sizes, mean_tokens, draws, self._base)
        found = {source.name: rate / size for source, rate, size in zip(self._sources, rates, sizes, strict=True) if rate > size}
        self.repeats.update({name: max(epochs, self.repeats.get(name, epochs)) for name, epochs in found.items()})
        return PlannedPhase(begin, weights, tuple(rates), draws)

    def _place(self, later: Sequence[Phase], steps: int) -> None:
        """Finds the window at which each later phase begins."""
        packs, a_window, run_packs = Fraction(0), Fraction(0), (steps - self.origin.step) * self._batch_packs
        for phase in later:
            wanted = (phase.at * steps - self.origin.step) * self._batch_packs
            w, counted = self.phases[-1].begin, 0
            while packs + counted < wanted and counted < COUNTED_PACKS:
                counted += len(self.window(w))
                w += 1
            a_window = Fraction(counted, w - self.phases[-1].begin) if counted else a_window
            more = ceil((wanted - packs - counted) / a_window) if packs + counted < wanted else 0
            packs += counted + more * a_window
            if packs >= run_packs or w + more == self.phases[-1].begin:
                raise ValueError(
                    f"the phase at {float(phase.at):g} gets no window: a window holds about {float(a_window):.0f} packs, "
                    f"what is left of the run {run_packs}; a smaller data.window gives finer phases"
                )
            self._drawn.add(self._phase(w + more, phase.weights))

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
        return Window(pieces.take(by_pack), starts, index=w)

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
        if weight > 0 and source.images and (policy.most_tokens + extra > budgets.tokens or policy.most_tiles > budgets.images):
            raise ValueError(
                f"source {source.name!r}: an image of {policy.most_tokens} tokens with {extra} template tokens fits no pack of {budgets}"
            )


def _digest(plan: Plan, weights: Sequence[Fraction], extra_digest: str) -> str:
    ingredients = {
        "planner": PLANNER_VERSION,
        "sources": [[source.name, source.digest] for source in plan._sources],
        "weights": [str(weight) for weight in weights],
        "phases": [[phase.begin, [str(weight) for weight in phase.weights]] for phase in plan.phases],
        "origin": [plan.origin.window, sorted(plan.origin.ordinals.items())],
        "unit": plan._unit,
        "budgets": asdict(plan._budgets),
        "policy": {type(plan._policy).__name__: asdict(plan._policy)},
        "overhead": [int(extra) for extra in plan._overhead],
        "window": plan._draws,
        "global_batch": plan._batch_packs,
        "seed": plan._seed,
        "extra": extra_digest,
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
