"""What is measured of our own loader, each in a fresh process: the decode limit, pictures a second, the first batch, a worker's memory.

    python benchmarks/ours.py {limit,loader} SHARDS SKIP COUNT
    python benchmarks/ours.py start SHARDS WINDOW PACK
    python benchmarks/ours.py memory SHARDS BATCHES

The last line is the result, in JSON.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fixture
import psutil
import torch
from measure import SIZE, finish, throughput

from data_pipeline.config import DataConfig, ImageConfig, SourceConfig
from data_pipeline.loader import Loader, StepData, StepSampler
from data_pipeline.opened import open_data
from data_pipeline.plan.balance import CostModel
from data_pipeline.plan.plan import Cursor
from data_pipeline.processes import begin_worker
from data_pipeline.read.images import load_square
from data_pipeline.read.storage import ShardReader
from data_pipeline.shards.tar import read_members

SEED = 0
COSTS = CostModel(token=1, attention=0, image=0)
READINGS = 20
"""Readings of a worker's memory over a run; the first half is for caches to fill."""


def config(shards: Path) -> DataConfig:
    """The defaults, with one worker and steps of one pack (a pack of 4096 tokens holds three pictures of 1225)."""
    return DataConfig(tokenizer=str(fixture.TOKENIZER), sources={"pairs": SourceConfig(str(shards))}, global_batch=1, workers=1)


def steps(shards: Path, cursor: Cursor = Cursor(0, 0)) -> Iterator[StepData]:  # noqa: B008  frozen
    """The loader's steps, with everything opened anew."""
    settings = config(shards)
    return iter(Loader(settings, open_data(settings, SEED), SEED, COSTS, 0, 1, cursor, 0))


def loader(shards: Path) -> Iterator[int]:
    """Pictures of each step."""
    for step in steps(shards):
        if step.bad:
            raise RuntimeError(f"a picture was dropped: {step.bad[0]}")
        yield sum(m.batch.image_count for m in step.micro_batches)


def limit(shards: Path, count: int) -> Iterator[int]:
    """Decoding and resizing alone, of the pictures that `loader` reads, in memory already: what no loader with this decoder can pass."""
    begin_worker(0)
    policy = ImageConfig(size=SIZE)
    pictures = list(islice(_pictures(shards), count))
    while True:
        for data in pictures:
            load_square(data, policy, None)
            yield 1


def _pictures(shards: Path) -> Iterator[bytes]:
    """The encoded pictures in the order of the plan."""
    settings = config(shards)
    data, reader = open_data(settings, SEED), ShardReader()
    source = data.sources[0]
    for request in StepSampler(settings, data.plan, COSTS, 0, 1, Cursor(0, 0), 0):
        for row in (row for pieces in request.packs for row in pieces.row.tolist()):
            yield read_members(reader.read(source.locate(row)))["jpg"]


def start(shards: Path, cursor: Cursor) -> dict[str, float]:
    """Seconds from opening the data to the first step in hand; modules are loaded before."""
    began = time.perf_counter()
    next(steps(shards, cursor))
    return {"seconds": time.perf_counter() - began}


def memory(shards: Path, batches: int) -> dict[str, float]:
    """MiB of its own that the worker has gained from the middle of a run to its end."""
    readings = []
    for number, _ in zip(range(batches), steps(shards), strict=False):
        if number % max(1, batches // READINGS) == 0:
            (worker,) = [p for p in psutil.Process().children() if p.memory_full_info().uss > 2**24]
            readings.append(worker.memory_full_info().uss / 2**20)
    middle = len(readings) // 2
    return {"growth_mib": statistics.median(readings[-3:]) - statistics.median(readings[middle : middle + 3]), "mib": readings[-1]}


def main() -> None:
    """Runs what the command line asks for."""
    what, shards, *numbers = sys.argv[1:]
    first, second = map(int, (*numbers, "0")[:2])
    torch.set_num_threads(1)
    folder = Path(shards)
    if what == "start":
        result = start(folder, Cursor(first, second))
    elif what == "memory":
        result = memory(folder, first)
    else:
        result = throughput(loader(folder) if what == "loader" else limit(folder, first + second), first, second)
    finish(result)


if __name__ == "__main__":
    main()
