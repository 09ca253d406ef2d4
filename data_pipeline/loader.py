"""The loader: walks the plan, lets torch's DataLoader materialise, and hands out whole optimizer steps.

The only stateful file of the package. Invariant: the sequence of steps is that of the plan from the start cursor, whatever the number
of workers; the state to save is the cursor that travels with a *consumed* step, since the sampler runs ahead.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.opened import Data
from data_pipeline.plan.balance import EMPTY, CostModel, assign, cost
from data_pipeline.plan.plan import Cursor, Packs, Plan
from data_pipeline.plan.split import Pieces
from data_pipeline.processes import begin_worker
from data_pipeline.read.cache import RangeCache
from data_pipeline.read.killers import AtWork, Killers
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.materialise import Materialiser
from data_pipeline.read.remote import RemotePath, worker_context
from data_pipeline.read.slots import Handover, Slots
from data_pipeline.read.storage import ShardReader


@dataclass(frozen=True)
class Request:
    """What one rank runs as one micro-batch of a step."""

    step: int
    micro: int
    micro_steps: int
    packs: tuple[Pieces, ...]
    cursor: Cursor
    """Where the next step begins."""
    progress: float | None
    """Share of the planned windows that is done after this step; None where the mix has no end of its own."""


@dataclass(frozen=True)
class MicroBatch:
    """A materialised request."""

    request: Request
    batch: PackedBatch
    bad: list[BadEntry]


@dataclass(frozen=True)
class StepData:
    """All micro-batches of one optimizer step of this rank."""

    step: int
    cursor: Cursor
    progress: float | None
    micro_batches: list[MicroBatch]

    @property
    def supervised(self) -> int:
        """Supervised tokens on this rank."""
        return sum(m.batch.supervised for m in self.micro_batches)

    @property
    def bad(self) -> list[BadEntry]:
        """What this rank had to drop."""
        return [entry for m in self.micro_batches for entry in m.bad]


class StepSampler(Sampler[Request]):
    """Walks the plan for one rank; the next window is planned in a thread while this one is trained on."""

    def __init__(self, config: DataConfig, plan: Plan, cost_model: CostModel, rank: int, ranks: int, cursor: Cursor, step: int) -> None:
        self.config, self.plan, self.cost_model = config, plan, cost_model
        self.rank, self.ranks = rank, ranks
        self.cursor, self.step = cursor, step
        self.asked: deque[Request] = deque()
        """Those on their way, in order: workers do not send them back."""

    def __iter__(self) -> Iterator[Request]:
        """Requests from the start cursor to the end of the plan."""
        cursor, step, ahead = self.cursor, self.step, 0
        thread = ThreadPoolExecutor(1, thread_name_prefix="plan")
        try:
            while True:
                global_batch = self.plan.global_batch(cursor)
                if not len(global_batch):
                    return
                cursor = global_batch.cursor
                if cursor.window >= ahead and not global_batch.done:
                    ahead = cursor.window + 1
                    thread.submit(self.plan.window, ahead)  # past the end it raises into the unread future
                slots = self.assign(global_batch)[:, self.rank]
                for micro, numbers in enumerate(slots):
                    packs = tuple(global_batch.pack(n) for n in numbers if n != EMPTY)
                    self.asked.append(Request(step, micro, len(slots), packs, cursor, global_batch.progress))
                    yield self.asked[-1]
                step += 1
        finally:
            thread.shutdown(wait=False)  # the garbage collector may end this iterator in that very thread, which cannot wait for itself

    def assign(self, packs: Packs) -> np.ndarray:
        """[micro_steps, ranks, micro_packs] numbers of packs or EMPTY; the same on every rank."""
        costs = cost(packs.pieces.tokens, packs.pieces.images, packs.pack_starts, self.cost_model)
        return assign(costs, self.ranks, self.config.micro_packs, self.config.global_batch)


Found = tuple[PackedBatch | Handover, list[BadEntry]] | UserError | TryAgainError
"""What comes back for a request: its batch, or from a worker where that lies, and what was dropped; or why there is none."""

IMAGES_AT_ONCE = 12
"""Tiles from which on a request goes to a worker alone: each way between processes, and each change from words to pictures, has a price."""


class _Requests(Dataset[list[Found]]):
    """`dataset[requests]` materialises; the pieces travel in the requests, so workers plan nothing.

    A user error travels as a value: torch would raise its own copy, with the worker's traceback for a message.
    """

    def __init__(self, materialiser: Materialiser, slots: Slots | None, at_work: AtWork) -> None:
        self.materialiser, self.slots, self.at_work = materialiser, slots, at_work

    def __getitems__(self, requests: list[Request]) -> list[Found]:
        """What torch calls for the requests of a worker's turn."""
        worker, packs = get_worker_info(), [request.packs for request in requests]
        try:
            if worker is None or self.slots is None:
                return list(self.materialiser.batches(packs, [None] * len(packs)))
            numbers, rooms = zip(*(self.slots.next(worker.id) for _ in requests), strict=True)
            made = self.materialiser.batches(packs, rooms, self.at_work.place(worker.id))
        except (UserError, TryAgainError) as error:
            return [error]
        return [(self.slots.lay(worker.id, number, batch), bad) for number, (batch, bad) in zip(numbers, made, strict=True)]


class Loader:
    """Iterates over `StepData` of one rank from a cursor."""

    def __init__(
        self,
        config: DataConfig,
        data: Data,
        seed: int,
        cost_model: CostModel,
        rank: int,
        ranks: int,
        cursor: Cursor,
        step: int,
        pin: bool = False,
        killers: Killers | None = None,
    ) -> None:
        """`pin`: tensors in page-locked memory. `killers`: of the run. Raises UserError: no shared memory for the workers."""
        cache = RangeCache(Path(config.cache_dir), int(config.cache_gib * 2**30)) if config.cache_dir else None
        self._remote = any(isinstance(source.path, RemotePath) for source in data.sources)
        self._pin = pin
        most = _most_images(config, data)
        turn = min(config.prefetch, -(-IMAGES_AT_ONCE // most)) if config.workers else 1
        turns = max(min(2, config.prefetch), -(-config.prefetch // turn))  # one in work while another is trained on
        room = most, config.images.size, config.micro_packs * config.context, config.images.tokens
        self._slots = Slots(config.workers, turn * (turns + 1), *room) if config.workers else None
        self._killers, self._at_work = killers, AtWork(config.workers)
        known = killers.known if killers else ()
        self._materialiser = Materialiser(data.sources, data.tokenizer, config.images, seed, ShardReader(cache), known)
        self._sampler = StepSampler(config, data.plan, cost_model, rank, ranks, cursor, step)
        self._loader = DataLoader(
            _Requests(self._materialiser, self._slots, self._at_work),
            sampler=self._sampler,
            batch_size=turn,
            collate_fn=_as_they_are,
            num_workers=config.workers,
            prefetch_factor=turns if config.workers else None,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # its own: starting an iterator must not move the training's random state
        )

    def __iter__(self) -> Iterator[StepData]:
        """Whole steps in order, until the plan ends.

        Raises:
            TryAgainError: the file system failed in a worker, or a worker died; what killed it is listed.
            UserError: an index lost its files.
        """
        micro_batches: list[MicroBatch] = []
        self._sampler.asked.clear()
        for found in self._found():
            if isinstance(found, Exception):
                raise found
            request = self._sampler.asked.popleft()
            micro_batches.append(MicroBatch(request, *self._received(*found)))
            if len(micro_batches) == request.micro_steps:
                yield StepData(request.step, request.cursor, request.progress, micro_batches)
                micro_batches = []

    def _found(self) -> Iterator[Found]:
        """What the workers hand over, in order."""
        if self._loader.num_workers and self._remote:
            self._loader.multiprocessing_context = worker_context(preload=__name__)
        others, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        turns = iter(self._loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch would raise for a dead worker wherever this process is, in the midst of a step or of a checkpoint; without its handler
            # it does so where the next batch is asked for
            signal.signal(signal.SIGCHLD, handler)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            yield from chain.from_iterable(turns)
        except RuntimeError:
            dead = [process for process in workers if process.exitcode is not None]
            if not dead:
                raise
            raise self._died(dead) from None

    def _died(self, workers: list[BaseProcess]) -> TryAgainError:
        """Lists what killed them, and says so."""
        deaths = [self._at_work.death(process) for process in workers]
        entries = [self._materialiser.entry(*d.sample, f"killed the worker that read it ({d.how})") for d in deaths if d.sample]
        if not entries:
            return TryAgainError(f"a data worker died ({deaths[0].how}) at no sample; the same command goes on")
        if self._killers:
            self._killers.add(entries)
        said = " and ".join(f"{e.key} in {e.shard} of source {e.source} {e.reason}" for e in entries)
        return TryAgainError(f"{said}; the same command goes on without it")

    def _received(self, found: PackedBatch | Handover, bad: list[BadEntry]) -> tuple[PackedBatch, list[BadEntry]]:
        """Out of the worker's slot: at once, since that is written again soon."""
        batch = self._slots.take(found, self._pin) if isinstance(found, Handover) and self._slots is not None else found
        return (batch.pin_memory() if self._pin else batch), bad


def _as_they_are(found: list[Found]) -> list[Found]:
    return found


def _most_images(config: DataConfig, data: Data) -> int:
    """Tiles that a micro-batch can hold; one, the dummy, where no source has any."""
    if not any(source.images for source in data.sources):
        return 1
    return config.micro_packs * max(1, min(config.images_per_pack, config.context // config.images.tokens))
