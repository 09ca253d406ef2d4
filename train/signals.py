"""Requests to a running job: stop, or save and go on; the loop asks at step borders.

Handlers do nothing but set a flag: work inside a signal handler hangs at random. Before training there is no flag to look at, and nothing
to lose: then the process leaves.
"""

import os
import signal
from contextlib import suppress
from types import FrameType

from data_pipeline.errors import EXIT_TRY_AGAIN
from train.run_dir import RunDir

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""In the environment of ranks that torchrun started: nobody else has made the run directory theirs."""
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def leave_when_asked(run: RunDir) -> None:
    """Until there is a `StopRequest`, one ends this process at once, and the outcome says so: starting up may take minutes.

    Under torchrun only rank 0 says so: others are ended too where that one was refused, and the outcome is another run's.
    """
    speaks = TORCHRUN not in os.environ or int(os.environ["RANK"]) == 0

    def leave(number: int, frame: FrameType | None) -> None:
        if speaks and not run.outcome.exists():
            with suppress(OSError):
                why = f"asked to stop ({signal.Signals(number).name}) before the first step of this life; the same command goes on"
                run.write_outcome(EXIT_TRY_AGAIN, why, 0)
        os._exit(EXIT_TRY_AGAIN)

    for number in REQUESTS:
        signal.signal(number, leave)


class StopRequest:
    """True once SIGTERM, SIGINT or SIGUSR2 came, or the stop file is there; for the file only rank 0 looks, since ranks agree on a stop."""

    def __init__(self, run_dir: RunDir, rank: int) -> None:
        self._file, self._looks = run_dir.stop_file, rank == 0
        self._signal: str | None = None
        for number in REQUESTS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def reason(self) -> str | None:
        """Why this rank wants to stop, or None."""
        if self._signal:
            return self._signal
        return f"{self._file} exists" if self._looks and self._file.exists() else None


class SaveRequest:
    """The file that asks for a checkpoint now. Taken back by the rank that sees it, once the checkpoint has begun."""

    def __init__(self, run_dir: RunDir, rank: int) -> None:
        self._file, self._looks = run_dir.save_file, rank == 0

    def made(self) -> bool:
        """Whether this rank was asked; only rank 0 looks."""
        return self._looks and self._file.exists()

    def answered(self) -> None:
        """Takes the request back."""
        if self._looks:
            self._file.unlink(missing_ok=True)
