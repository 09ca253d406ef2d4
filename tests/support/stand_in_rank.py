"""A rank that needs no torch: where a test shows what Slurm and the job script do, it starts in a fraction of a second.

What the job sees of it is what it sees of `train.rank`: config, heartbeat and watchdog, stop requests that all ranks agree on, complete
checkpoints, metrics, outcome and exit code are the real code. Instead of a model it has a chain of hashes: the loss of a step depends on
all steps before it, so that losses equal those of an undisturbed run only if each life went on from the exact state of a checkpoint.

STAND_IN_HOLDS_AT is a step after which a run waits until RUN/go is there; STAND_IN_FAILS_AT one that no life survives.
"""

import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_TRY_AGAIN
from data_pipeline.processes import end_with_parent
from train import configure
from train.run_dir import RunDir, write_json
from train.signals import StopRequest, leave_when_asked
from train.watchdog import Watchdog

STEP_S = 0.05


class Peers:
    """What ranks agree on, over sockets: like a collective, it waits for the slowest, and fails once a rank is gone."""

    def __init__(self, rank: int, world: int) -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._rank = rank
        if rank == 0:
            self._server = socket.create_server(("", address[1]))  # on all addresses and kept, as torch's store is
            self._others = [self._server.accept()[0] for _ in range(world - 1)]
        else:
            deadline = time.monotonic() + 60
            while True:
                try:
                    self._others = [socket.create_connection(address)]
                    break
                except ConnectionRefusedError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self._rank:
            self._others[0].sendall(bytes([flag]))
            return self._hear(self._others[0])
        flag = any([flag, *(self._hear(other) for other in self._others)])
        for other in self._others:
            other.sendall(bytes([flag]))
        return flag

    def _hear(self, other: socket.socket) -> bool:
        said = other.recv(1)
        if not said:
            raise ConnectionError("a rank is gone")
        return bool(said[0])


def losses(steps: int) -> dict[int, float]:
    """Of a run that nothing disturbed."""
    return {step: loss for step, (loss, _) in zip(range(1, steps + 1), _chain(""), strict=False)}


def _chain(state: str) -> Iterator[tuple[float, str]]:
    while True:
        state = hashlib.sha256(state.encode()).hexdigest()
        yield int(state[:8], 16) / 2**32, state


def main() -> None:
    """Entry point: RUN_DIR."""
    end_with_parent()
    run = RunDir(Path(sys.argv[1]))
    leave_when_asked(run)
    lives_before = run.life()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log = os.open(run.logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    config = configure.read_resolved(run.path)
    watchdog = Watchdog(config.watchdog, run, rank, world)
    try:
        code, reason, step = live(run, config.train.steps or 0, config.checkpoint.every, rank, Peers(rank, world), watchdog)
    except OSError as error:
        code, reason, step = EXIT_CRASH, f"rank {rank}: {error}", 0
        if run.outcome.exists() or run.life() > lives_before + 1:
            os._exit(code)
    if rank == 0 or code == EXIT_CRASH:
        run.write_outcome(code, reason, step)
    os._exit(code)


def live(run: RunDir, steps: int, every: int, rank: int, peers: Peers, watchdog: Watchdog) -> tuple[int, str, int]:
    """One life; returns how it ended."""
    stop, go = StopRequest(run, rank), run.path / "go"
    holds_at, fails_at = (int(os.environ.get(f"STAND_IN_{what}_AT", -1)) for what in ("HOLDS", "FAILS"))
    newest = max(run.checkpoints.glob("step-*/manifest.json"), default=None)
    step = int(newest.parent.name[5:]) if newest else 0
    state = (newest.parent / "state").read_text() if newest else ""
    facts = {"world": 2, "sequence": 1, "device": "cpu", "plan": "", "origin": {}, "cost": {}}
    life = run.begin_life(watchdog.began, step or None, **facts) if rank == 0 else 0
    chain = _chain(state)
    while step < steps:
        watchdog.beat(step, "forward")
        time.sleep(STEP_S)
        if peers.any(stop.reason() is not None):
            save(run, rank, step, state)
            return EXIT_TRY_AGAIN, f"stopped after step {step} ({stop.reason() or 'another rank was asked'})", step
        if peers.any(step == holds_at and not go.exists()):
            continue
        if step + 1 == fails_at:
            return EXIT_CRASH, f"rank {rank}: step {fails_at} cannot be done", step
        loss, state = next(chain)
        step += 1
        if rank == 0:
            jsonl.append(run.metrics, [{"step": step, "life": life, "time": time.time(), "progress": step / steps, "loss/train": loss}])
        if step % every == 0 or step == steps:
            save(run, rank, step, state)
        watchdog.started()
    if rank == 0:
        run.final.mkdir()
        write_json(run.final / "manifest.json", {})
    return EXIT_DONE, "done", step


def save(run: RunDir, rank: int, step: int, state: str) -> None:
    """A checkpoint: complete or invisible."""
    folder = run.checkpoints / f"step-{step:08d}"
    if rank or folder.exists() or not step:
        return
    partial = run.checkpoints / f".{folder.name}.partial"
    partial.mkdir(exist_ok=True)
    (partial / "state").write_text(state)
    write_json(partial / "manifest.json", {})
    partial.rename(folder)


if __name__ == "__main__":
    main()
