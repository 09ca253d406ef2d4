"""Samples that killed the worker that read them: seen by its rank, listed with the run, dropped by all later lives.

    RUN/killers/rank-N.jsonl    a line a sample, by the rank whose worker died

Invariant: a sample is listed if its worker died while it made a segment of it, other than by a request to stop; all ranks of a life drop
what was listed when it began. The list lies beside the checkpoints, not in them: a death comes between two of them.
"""

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_pipeline import jsonl
from data_pipeline.read.ledger import BadEntry

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What ends a worker from outside, whatever it reads."""


class Death(NamedTuple):
    """How a worker died, and the sample that it was at; None where it was at none, or was asked to stop."""

    how: str
    sample: tuple[int, int] | None
    """(source, row)."""


class AtWork:
    """The sample that each worker is at, in shared memory: it outlives the worker. Made before the workers, which inherit it."""

    def __init__(self, workers: int) -> None:
        self._at = torch.full((workers, 3), -1, dtype=torch.int64).share_memory_()

    def place(self, worker: int) -> np.ndarray:
        """[2] int64 where this process, a worker, writes the (source, row) that it is at; -1, -1 for none."""
        self._at[worker, 0] = os.getpid()
        return self._at[worker, 1:].numpy()

    def death(self, process: BaseProcess) -> Death:
        """Of a worker that has ended."""
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        at = {pid: (source, row) for pid, source, row in self._at.tolist() if row >= 0}
        return Death(how, None if -code in STOPS else at.get(process.pid))


class Killers:
    """The list of a run, as one rank knows it and adds to it."""

    def __init__(self, run_dir: Path, rank: int, known: Sequence[BadEntry]) -> None:
        self._path = _folder(run_dir) / f"rank-{rank}.jsonl"
        self.known = known

    def add(self, entries: Iterable[BadEntry]) -> None:
        """Lists samples for the lives to come."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        jsonl.append(self._path, map(asdict, entries))


def read_killers(run_dir: Path) -> list[BadEntry]:
    """What all ranks of all lives have listed."""
    return [BadEntry(**line) for file in sorted(_folder(run_dir).glob("*.jsonl")) for line in jsonl.read(file)]


def _folder(run_dir: Path) -> Path:
    return run_dir / "killers"
