"""How a contestant is measured: in a fresh process with one worker, in pictures a second of the worker's processor time.

Invariant: all threads of the worker are counted, and nothing else is: what other programs do to the clock on the wall does not enter.
The first pictures, which pay for starting up, are not counted.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import torch

SIZE = 490
BATCH = 16
SHUFFLE_BUFFER = 100
"""Samples in the shuffle buffers of webdataset and Energon."""


def throughput(batches: Iterator[int], skip: int, count: int) -> dict[str, float]:
    """Pictures a second over `count` pictures behind the first `skip`; `batches` yields the pictures of each batch.

    By the processor time of the worker, by that of the contestant's processes together, and by the clock on the wall.

    Raises:
        RuntimeError: the contestant ended before that.
    """
    seen = 0
    while seen < skip:
        seen += _next(batches)
    (own, worker), wall, counted = _processor_seconds(), time.perf_counter(), 0
    while counted < count:
        counted += _next(batches)
    wall = time.perf_counter() - wall
    own_after, worker_after = _processor_seconds()
    own, worker = own_after - own, worker_after - worker
    return {"the worker": counted / (worker or own), "all its processes": counted / (own + worker), "the wall clock": counted / wall}


def _processor_seconds() -> tuple[float, float]:
    """Used so far by this process and by all below it, threads included."""
    own = psutil.Process()
    first, *rest = (sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))
    return first, sum(rest)


def finish(result: dict[str, float]) -> NoReturn:
    """Prints the result and ends everything at once: workers are in the middle of their data, and nobody waits for them."""
    print(json.dumps(result), flush=True)
    for process in psutil.Process().children(recursive=True):
        if not any("resource_tracker" in word for word in process.cmdline()):  # it removes mosaic's shared memory, then ends
            process.kill()
    os._exit(0)


def _next(batches: Iterator[int]) -> int:
    found = next(batches, None)
    if found is None:
        raise RuntimeError("ended before its pictures were counted")
    return found


def peer(prepare: Callable[[Path, Path], None], batches: Callable[[Path, Path, str], Iterator[int]]) -> None:
    """The command line of a peer: `prepare SHARDS WORK` or `run SHARDS WORK DECODER SKIP COUNT`; the result is the last line, in JSON.

    Args:
        prepare: makes from the folder of shards whatever the peer reads, in the work folder.
        batches: the pictures of each batch, by the decoder that the peer documents (`pil`) or by ours (`fast`).
    """
    command, shards, work, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if command == "prepare":
        prepare(Path(shards), Path(work))
        finish({"processor_s": sum(os.times()[:4])})  # processes that have ended are counted there
    decoder, skip, count = rest
    finish(throughput(batches(Path(shards), Path(work), decoder), int(skip), int(count)))
