"""Starts the ranks of a stage on this machine, watches them, and turns their end into an exit code.

Invariant: when `run_stage` returns, no process that it started is left. One life at a time owns a run directory.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import Any

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_TRY_AGAIN, EXIT_USER
from train import configure
from train.config import Config, WatchdogConfig
from train.run_dir import RunDir, own, read_json, write_atomic

GRACE_S = 10.0
"""How long ranks may take to end after one of them has ended with an error."""
POLL_S = 0.05
MUTE_S = 60.0
"""How much longer than the longest limit of the watchdog the heartbeat may stand still."""


def run_stage(config: Config, procs: int) -> int:
    """Runs one stage with `procs` ranks; returns its exit code."""
    with made(config) as run:
        run.stop_file.unlink(missing_ok=True)
        again = True
        while again:
            outcome, again = _live(config, run, procs)
            if outcome["code"] != EXIT_DONE:
                print(f"{'error: ' if outcome['code'] in (1, 2) else ''}{outcome['reason']}", file=sys.stderr)
    return int(outcome["code"])


def _live(config: Config, run: RunDir, procs: int) -> tuple[dict[str, Any], bool]:
    """One life: its outcome, and whether another one is to follow at once."""
    run.forget_outcome()
    lives_before = run.life()
    ranks = [_start(run, rank, procs, port) for port in [free_port()] for rank in range(procs)]
    code, asked_to_stop = _watch(ranks, run, config.watchdog)
    outcome = run.read_outcome()
    with suppress(OSError):  # a full disk must not hide why the run ended
        if outcome is None:
            step = run.last_step()
            reason = f"a rank was killed (see {run.logs})"
            if code == EXIT_USER:  # nobody could say why
                reason = f"cannot write in {run.path} (free space, or make it writable; the same command goes on)"
            outcome = {"code": code or EXIT_CRASH, "reason": f"{config.run.name}: {reason}", "step": step}
            run.write_outcome(**outcome)
        if run.life() > lives_before:
            run.end_life(outcome["code"], outcome["reason"], outcome["step"])
    return outcome, bool(outcome.get("again")) and not (asked_to_stop or run.stop_file.exists())


@contextmanager
def made(config: Config) -> Iterator[RunDir]:
    """The run directory of a checked stage, held, with the config in it: the next life of a run that somebody else holds reads its own.

    Raises:
        UserError: another process holds it, or it belongs to another config: hours may have passed since the stage was checked.
    """
    run = RunDir(config.run.dir)
    run.create()
    with own(run):
        configure.require_same(config, run.path)
        write_atomic(run.config, configure.to_yaml(config).encode())
        yield run


def rank_environment(rank: int, procs: int, port: int) -> dict[str, str]:
    """What a rank needs to find the others; cores are shared out, since two ranks on one core collapse."""
    threads = max(1, (os.cpu_count() or 1) // procs)
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(procs),
        "LOCAL_SIZE": str(procs),
        "LOCAL_WORLD_SIZE": str(procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _start(run: RunDir, rank: int, procs: int, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train.rank", str(run.path)]
    # A session of its own: Ctrl-C reaches the launcher alone, which asks the ranks to stop.
    return subprocess.Popen(command, env=rank_environment(rank, procs, port), start_new_session=True)


def _watch(ranks: list[subprocess.Popen[bytes]], run: RunDir, limits: WatchdogConfig) -> tuple[int, bool]:
    """Waits for all ranks; the first that fails takes the others with it. Stop signals are passed on.

    Returns the exit code and whether there was such a signal.

    Where a watchdog ended it, the ranks that are left cannot run theirs: they are made to show their stacks.
    """
    pulse, asked_to_stop = Pulse(run, limits), False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        failed_at: float | None = None
        while any(p.poll() is None for p in ranks):
            codes = [p.poll() for p in ranks]
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
                if run.hang.exists():
                    _show_stacks(ranks)
            if failed_at is None and (silent := pulse.silent_s()):
                _show_stacks(ranks)
                time.sleep(1)
                reason = f"rank 0 does not answer at all, since {silent:.0f} s (see {run.logs}/stacks-rank-*.txt; the same command goes on)"
                run.write_outcome(EXIT_TRY_AGAIN, reason, run.last_step())
                break
            if failed_at is not None and (time.monotonic() - failed_at > GRACE_S or any(c is not None and c < 0 for c in codes)):
                break
            time.sleep(POLL_S)
    finally:
        for process in ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the rank and its data workers
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return max((p.returncode if p.returncode >= 0 else EXIT_CRASH for p in ranks), default=EXIT_DONE), asked_to_stop


def _show_stacks(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Asks the ranks that are left for their stacks (train/watchdog.py)."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)


class Pulse:
    """The heartbeat of a life as seen from outside: the last resort where the only rank, or each of them, holds its interpreter.

    Counted in ticks of this process since the file last changed: clocks jump.
    """

    def __init__(self, run: RunDir, limits: WatchdogConfig) -> None:
        self._run, self._longest = run, max(asdict(limits).values())
        self._seen: Any = None
        self._seen, self._changed = self._read(), 0.0

    def silent_s(self) -> float:
        """Seconds without a beat, where they are so many that not even a watchdog can be running; else 0, as before the first beat."""
        beat = self._read()
        if beat != self._seen:
            self._seen, self._changed = beat, time.monotonic()
        silent = time.monotonic() - self._changed if self._changed else 0.0
        return silent if self._longest and silent > self._longest + MUTE_S else 0.0

    def _read(self) -> Any:
        with suppress(OSError, ValueError):
            return read_json(self._run.heartbeat)
        return self._seen


def free_port() -> int:
    """A port on this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
