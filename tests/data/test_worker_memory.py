"""A loader's worker takes as much memory after many batches as after a few: runs last for weeks, and a node has hundreds of workers."""

import multiprocessing
from statistics import median

import psutil
import pytest
from demo_data import data_config, run

from data_pipeline.config import MixUnit

READINGS = 30
"""Readings of a run; the first half is for caches and the allocator to fill."""
GROWTH_MIB = 1.0
"""Bound on what a worker gains. Over the 500 batches behind the middle of the short run, one kept picture a batch (3 KiB) comes to 1.5."""
GROWTH_FILES = 10
"""Bound on what it opens: batches that are on their way have files, about ten more or fewer of them; one kept a batch comes to 500."""


def growth(demo, batches: int) -> tuple[float, int]:
    """What the one worker gained from the middle of a run to its end: MiB of anonymous memory, and open files.

    Anonymous memory is what a process has of its own; unlike USS, it does not grow when a forked process writes to what it inherited.
    """
    others = multiprocessing.active_children()
    steps = run(data_config(demo.root, unit=MixUnit.samples, global_batch=1, workers=1))
    own, files = [], []
    for number, _ in zip(range(batches), steps, strict=False):
        if number % (batches // READINGS) == 0:
            (worker,) = (psutil.Process(process.pid) for process in multiprocessing.active_children() if process not in others)
            own.append(sum(found.anonymous for found in worker.memory_maps()) / 2**20)
            files.append(worker.num_fds())
    assert len(own) >= READINGS
    middle = slice(READINGS // 2, READINGS // 2 + 5)
    return median(own[-5:]) - median(own[middle]), max(files[-5:]) - max(files[middle])


def test_the_memory_of_a_worker_does_not_grow_over_a_thousand_batches(demo):
    memory, files = growth(demo, 1000)
    assert memory < GROWTH_MIB
    assert files < GROWTH_FILES


@pytest.mark.soak
def test_the_memory_of_a_worker_does_not_grow_over_twenty_thousand_batches(demo, capsys):
    memory, files = growth(demo, 20_000)
    with capsys.disabled():
        print(f"\na worker's growth over 10,000 batches, behind 10,000 more: {memory:.2f} MiB, {files} files")
    assert memory < GROWTH_MIB
    assert files < GROWTH_FILES
