"""A sample that kills its worker ends one life; all later lives drop it like a corrupt one, on any world."""

import faulthandler
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from demo_data import COSTS, SEED, START, data_config, segments_of
from worker_faults import Deadly

from data_pipeline.config import DataConfig
from data_pipeline.errors import TryAgainError
from data_pipeline.loader import Loader, StepData
from data_pipeline.opened import open_data
from data_pipeline.read import budget
from data_pipeline.read.killers import AtWork, Killers, read_killers
from data_pipeline.read.materialise import Materialiser
from data_pipeline.read.storage import Location, ShardReader
from data_pipeline.samples import BadSample

STEPS, AT = 5, 2
"""Steps of a life, and the one that holds the sample."""


def life(config: DataConfig, run: Path, rank: int, ranks: int) -> tuple[list[StepData], TryAgainError | None]:
    """The steps of a rank, and how it ended where it did."""
    killers = Killers(run, rank, read_killers(run))
    loader = iter(Loader(config, open_data(config, SEED), SEED, COSTS, rank, ranks, START, 0, killers=killers))
    steps: list[StepData] = []
    try:
        steps += [next(loader) for _ in range(STEPS)]
    except TryAgainError as error:
        return steps, error
    return steps, None


def test_a_sample_that_kills_its_worker_is_dropped_by_all_ranks_of_later_lives(demo, tmp_path, monkeypatch):
    alone = data_config(demo.root)
    whole, _ = life(alone, tmp_path, 0, 1)
    pieces = whole[AT].micro_batches[0].request.packs[0]
    row = int(pieces.row[pieces.source == 0][0])
    source = open_data(alone, SEED).sources[0]
    key, place = source.key(row), source.locate(row)
    monkeypatch.setattr("data_pipeline.loader.begin_worker", Deadly(key))
    config = data_config(demo.root, workers=2)
    handler = signal.getsignal(signal.SIGCHLD)
    errors = [str(error) for _, error in (life(config, tmp_path, rank, 2) for rank in range(2)) if error]
    assert errors == [
        f"{key} in {place.shard.name} of source pairs killed the worker that read it (SIGKILL); the same command goes on without it"
    ]
    assert signal.getsignal(signal.SIGCHLD) is handler, "a death must not be raised in the midst of a step"
    assert [(e.shard, e.key, e.offset, e.size) for e in read_killers(tmp_path)] == [(place.shard.name, key, place.offset, place.size)]

    worlds = [life(config, tmp_path, rank, 3) for rank in range(3)]
    assert [error for _, error in worlds] == [None] * 3
    bad = [(step.step, entry.key, entry.reason) for steps, _ in worlds for step in steps for entry in step.bad]
    assert bad == [(AT, key, "killed the worker that read it (SIGKILL)")]
    charged = [sum(counts) for counts in zip(*(budget.charges(steps[AT], list(config.sources)) for steps, _ in worlds), strict=True)]
    assert charged[3:] == [1, 0, 0]
    for number, expected in enumerate(whole):
        found = Counter(s for steps, _ in worlds for m in steps[number].micro_batches for s in segments_of(m.batch))
        lost = Counter(s for m in expected.micro_batches for s in segments_of(m.batch)) - found
        assert [(s.source, s.sample) for s in lost] == ([(0, row)] if number == AT else [])


def test_a_worker_that_waits_for_the_store_is_at_no_sample(demo):
    config = data_config(demo.root)
    data = open_data(config, SEED)
    packs = [p for m in next(iter(Loader(config, data, SEED, COSTS, 0, 1, START, 0))).micro_batches for p in m.request.packs]
    at = np.full(2, -1)
    while_reading = []

    class Waiting(ShardReader):
        def read_all(self, places: Sequence[Location]) -> list[bytes | BadSample]:
            while_reading.append(at.tolist())
            return super().read_all(places)

    Materialiser(data.sources, data.tokenizer, config.images, SEED, Waiting()).batches([packs, packs], [None, None], at)
    assert len(while_reading) > 1 and set(map(tuple, while_reading)) == {(-1, -1)}


@pytest.mark.parametrize(
    ("number", "row", "expected"),
    [(signal.SIGSEGV, 7, ("SIGSEGV", (1, 7))), (signal.SIGTERM, 7, ("SIGTERM", None)), (signal.SIGKILL, -1, ("SIGKILL", None))],
)
def test_only_a_worker_that_was_at_a_sample_and_not_asked_to_stop_was_killed_by_it(number, row, expected):
    at_work = AtWork(2)

    def work() -> None:
        faulthandler.disable()  # pytest has it on, for crashes that nobody meant
        at_work.place(1)[:] = 1, row
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert at_work.death(process) == expected
