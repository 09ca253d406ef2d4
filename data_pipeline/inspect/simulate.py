"""`xc-data simulate`: what a run would do to its ranks and its disks, from the index alone.

Invariant: opens no tar and decodes nothing. Packs and their places are the plan's own, dealt by the function that the loader calls; only
the uniform shuffle that the plan is compared with is drawn at random, with a fixed seed.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_pipeline.batch import T_BUCKET
from data_pipeline.config import DataConfig
from data_pipeline.configure import load_data_view
from data_pipeline.errors import UserError
from data_pipeline.inspect.shuffle import OneShard, neighbour_distance, one_shard
from data_pipeline.loader import StepSampler
from data_pipeline.opened import Data, open_data
from data_pipeline.plan.balance import EMPTY, CostModel, cost
from data_pipeline.plan.plan import Cursor, Packs
from data_pipeline.plan.split import Pieces

TOKEN_7B, ATTENTION_7B, PATCH_7B, PATCH_SIDE = 1_703_936, 32, 73_728, 14
"""Costs of a token, of a pair of tokens and of an image patch for InternLM2-7B behind CLIP ViT-L/14, in the units of a run's own
(2 x hidden FLOPs forward): what `cost` in RUN/lives.jsonl says of such a run."""
STEPS = 1000
"""Simulated by default, fewer where the run ends before."""
NEIGHBOUR_DRAWS = 4_000_000
"""Draws of a source whose neighbours are looked up: bounds memory."""
SAY_S = 10.0
"""Seconds between lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Step:
    """What one step would be. Max/mean is over ranks: 1 is perfect balance."""

    packs: int
    tokens: int
    """Without padding."""
    fill: float
    """Tokens / what the packs could hold; empty packs left out."""
    padding_free: float
    """Tokens / tokens laid out on all ranks, with padding segments and empty packs."""
    empty: float
    """Share of the places that an empty pack fills."""
    image_tokens: tuple[float, float]
    """(mean, max) of a rank."""
    cost: float
    """max/mean of the ranks' sums."""
    lock_step: float
    """Sum over micro-steps of the dearest rank / mean of the ranks' sums: what is lost where ranks wait after each micro-step."""
    samples: tuple[int, ...]
    """First drawn, by source."""
    tokens_by_source: tuple[int, ...]
    bytes: int
    """Read from shards by all ranks."""
    shards: int
    """That samples are read from."""
    shuffle: OneShard
    uniform: OneShard
    """The same counts, drawn uniformly."""


@dataclass(frozen=True)
class Simulation:
    """A simulated run."""

    section: DataConfig
    data: Data
    world: int
    cost: CostModel
    steps: list[Step]
    ended: bool
    """The run ends with the last step."""
    run_steps: int | None
    """Of the whole run, estimated where it was not walked to its end; None for a mix without end."""
    neighbours: tuple[float, float]
    """Mean steps between physical neighbours: as drawn, and with the same draws permuted; 0 where there are none."""

    @property
    def full_steps(self) -> list[Step]:
        """Without the run's last step where that is short: its balance says nothing about the others."""
        return [s for s in self.steps if s.packs == self.section.global_batch] or self.steps

    @property
    def micro_steps(self) -> int:
        """Micro-steps of every rank."""
        return -(-self.section.global_batch // (self.world * self.section.micro_packs))

    @property
    def warnings(self) -> list[str]:
        """What someone should know before the run."""
        section, places = self.section, self.world * self.section.micro_packs
        found = []
        lost = 1 - section.global_batch / (self.micro_steps * places)
        if lost:
            near = sorted({max(1, self.micro_steps - 1) * places, self.micro_steps * places})
            found.append(
                f"data.global_batch: {section.global_batch} packs do not divide over {self.world} ranks x {section.micro_packs}: "
                f"{lost:.1%} of all packs are empty (use {' or '.join(map(str, near))})"
            )
        draws = min(phase.draws for phase in self.data.plan.phases)
        if draws < section.window:
            found.append(f"data.window: {draws:,} draws, not {section.window:,}: else a large source would repeat inside a window")
        for name, epochs in self.data.plan.repeats.items():
            found.append(f"data.sources.{name}: drawn {float(epochs):.1f} times inside one window (lower its weight, or give it more data)")
        return found


def simulate(config: Path, overrides: list[str], world: int, steps: int | None, coefficients: str | None) -> Simulation:
    """Walks the plan for `steps` steps as `world` ranks would.

    Raises:
        UserError: the config or the data cannot be used, or an argument is no sensible number.
    """
    if world < 1 or (steps is not None and steps < 1):
        raise UserError(f"--world {world} --steps {steps}: nothing to simulate (both are at least 1)")
    view = load_data_view(config, overrides)
    section, data = view.data, open_data(view.data, view.run.seed, view.train.steps)
    model = _cost_model(coefficients) if coefficients else default_cost(section.images.size)
    ends = view.train.steps
    count = min(steps or STEPS, ends or sys.maxsize)
    walked = _Walk(section, data, world, model)
    found = list(_tell(walked.steps(count), count))
    if walked.done:
        whole: int | None = len(found)
    elif data.plan.windows is not None and ends is None:
        whole = round(len(found) / walked.progress) if walked.progress else None
    else:
        whole = ends
    return Simulation(section, data, world, model, found, whole == len(found), whole, walked.neighbours())


def default_cost(image_size: int) -> CostModel:
    """Costs of the 7B for square images of this side in pixels."""
    return CostModel(TOKEN_7B, ATTENTION_7B, (image_size // PATCH_SIDE) ** 2 * PATCH_7B)


def _cost_model(text: str) -> CostModel:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise UserError(
            f"--cost {text!r} is not TOKEN,ATTENTION,IMAGE in whole numbers (a run's own are in the start line of RUN/lives.jsonl)"
        )
    return CostModel(*map(int, parts))


class _Walk:
    """Walks the plan once and keeps what the measures of the whole need."""

    def __init__(self, section: DataConfig, data: Data, world: int, model: CostModel) -> None:
        self.done, self.progress = False, 0.0
        self._section, self._data, self._world, self._model = section, data, world, model
        self._first_rows = [np.asarray(source.facts.shard_first_rows) for source in data.sources]
        self._draws: list[list[np.ndarray]] = [[] for _ in data.sources]
        self._drawn = [0] * len(data.sources)
        self._uniform = np.random.default_rng(0)

    def steps(self, count: int) -> Iterator[Step]:
        """The first `count` steps, fewer where the run ends before."""
        cursor = Cursor(0, 0)
        sampler = StepSampler(self._section, self._data.plan, self._model, 0, self._world, cursor, 0)
        for number in range(count):
            batch = self._data.plan.global_batch(cursor)
            if not len(batch):
                return
            yield self._step(number, batch, sampler.assign(batch))
            cursor, self.done, self.progress = batch.cursor, batch.done, batch.progress or 0.0

    def neighbours(self) -> tuple[float, float]:
        """Mean distance of physical neighbours over all sources, and that of a permutation of the same draws."""
        measured, uniform = [], []
        for parts in self._draws:
            if parts:
                rows, epochs, steps = np.concatenate(parts, axis=1)
                measured.append(neighbour_distance(rows, epochs, steps))
                uniform.append(neighbour_distance(rows, epochs, self._uniform.permutation(steps)))
        pairs = max(1, sum(count for _, count in measured))
        return sum(mean * count for mean, count in measured) / pairs, sum(mean * count for mean, count in uniform) / pairs

    def _step(self, number: int, packs: Packs, places: np.ndarray) -> Step:
        pieces, starts = packs.pieces, packs.pack_starts
        lengths = pieces.tokens.astype(np.int64) - ~pieces.last  # a piece that does not end its sample has no end token
        sources = len(self._data.sources)

        def dealt(values: np.ndarray) -> np.ndarray:
            """[micro_steps, ranks] sums of a quantity of the packs."""
            return np.append(values, 0)[places].sum(2)  # EMPTY indexes the last

        tokens = dealt(np.add.reduceat(lengths, starts[:-1]))
        laid = -(-(tokens + 1) // T_BUCKET) * T_BUCKET
        costs = dealt(cost(pieces.tokens, pieces.images, starts, self._model))
        mean = costs.sum() / self._world
        of_rank = dealt(np.add.reduceat(self._data.plan.image_tokens(pieces), starts[:-1])).sum(0)
        begins = (pieces.start_element == 0) & (pieces.start_offset == 0)
        rows = [pieces.row[begins & (pieces.source == s)] for s in range(sources)]
        self._note(number, pieces, begins, rows)
        shards = [self._shards(s, pieces.row[pieces.source == s]) for s in range(sources)]
        return Step(
            packs=len(packs),
            tokens=int(lengths.sum()),
            fill=float(lengths.sum() / (len(packs) * self._section.context)),
            padding_free=float(lengths.sum() / laid.sum()),
            empty=float((places == EMPTY).mean()),
            image_tokens=(float(of_rank.mean()), float(of_rank.max())),
            cost=float(costs.sum(0).max() / mean),
            lock_step=float(costs.max(1).sum() / mean),
            samples=tuple(map(len, rows)),
            tokens_by_source=tuple(np.bincount(pieces.source, lengths, sources).astype(np.int64).tolist()),
            bytes=sum(self._data.sources[s].locate(row).size for s, row in zip(pieces.source.tolist(), pieces.row.tolist(), strict=True)),
            shards=sum(len(np.unique(of_source)) for of_source in shards),
            shuffle=one_shard([self._shards(s, rows[s]) for s in range(sources)]),
            uniform=one_shard([self._shards(s, self._anywhere(s, len(rows[s]))) for s in range(sources)]),
        )

    def _note(self, number: int, pieces: Pieces, begins: np.ndarray, rows: list[np.ndarray]) -> None:
        for s, of_source in enumerate(rows):
            if self._drawn[s] < NEIGHBOUR_DRAWS and len(of_source):
                epochs = pieces.epoch[begins & (pieces.source == s)]
                self._draws[s].append(np.stack([of_source, epochs, np.full(len(of_source), number)]))
                self._drawn[s] += len(of_source)

    def _anywhere(self, s: int, count: int) -> np.ndarray:
        """Rows of `count` kept samples of a source, drawn uniformly."""
        source = self._data.sources[s]
        ordinals = self._uniform.integers(0, int(source.block_starts[-1]), count)
        return np.concatenate([np.empty(0, np.int64), *(source.kept(o, o + 1) for o in ordinals.tolist())])

    def _shards(self, s: int, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_rows[s], rows, "right") - 1


def _tell(steps: Iterable[Step], count: int) -> Iterator[Step]:
    """Passes the steps on and says on stderr how far they are."""
    if sys.stderr.isatty():
        with Progress(console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(steps, total=count, description="steps")
        return
    said = time.monotonic()
    for number, step in enumerate(steps, 1):
        yield step
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            print(f"simulated {number:,} of {count:,} steps", file=sys.stderr)
