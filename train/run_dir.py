"""The run directory: where each thing of a stage lies, and how files get there whole.

    config.yaml      the resolved config            checkpoints/step-N/   complete checkpoints; `latest` names the newest
    metrics.jsonl    a line a step                  final/                weights at the end, with their manifest
    lives.jsonl      starts and ends of lives       ledger/               bad samples
    outcome.json     how the last life ended        logs/rank-N.log       what each rank said
    heartbeat.json   step, phase, time              tracking/             TensorBoard and wandb files
    evaluation.json  figures on held-out data       stop                  touch it to stop the run
    skipped/         skipped steps, rollbacks       save                  touch it to get a checkpoint now
    profile/         traces of some steps           logs/stacks-rank-N.txt, hang.json   what hung (train/watchdog.py)
    killers/         samples that killed a worker       validation/           captions written on the way, their pictures

Invariant: a file that others read is replaced in one step, never seen half-written.
"""

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from data_pipeline.errors import UserError


class RunDir:
    """Paths of one run directory, and its small files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.lives = self.path / "lives.jsonl"
        self.outcome = self.path / "outcome.json"
        self.heartbeat = self.path / "heartbeat.json"
        self.evaluation = self.path / "evaluation.json"
        self.stop_file = self.path / "stop"
        self.hang = self.path / "hang.json"
        self.save_file = self.path / "save"
        self.lock = self.path / ".lock"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"
        self.logs = self.path / "logs"
        self.tracking = self.path / "tracking"
        self.validation = self.path / "validation"

    def create(self) -> None:
        """Makes the directory.

        Raises:
            UserError: it cannot be written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self.lock.open("a").close()  # folders that are there tell nothing
        except OSError as error:
            raise UserError(f"run.dir: cannot write {self.path.resolve()}: {error.strerror} (choose another directory)") from None

    def stacks(self, rank: int) -> Path:
        """Where a rank that hangs, or that got SIGUSR1, shows its stacks."""
        return self.logs / f"stacks-rank-{rank}.txt"

    def write_outcome(self, code: int, reason: str, step: int, again: bool = False) -> None:
        """How this life ended; becomes the exit code of the command, unless it is to live `again` at once."""
        outcome = {"code": code, "reason": reason, "step": step, "again": again, "life": self.life(), "time": time.time()}
        write_json(self.outcome, outcome)

    def read_outcome(self) -> dict[str, Any] | None:
        """How the last life ended, if it said so."""
        return read_json(self.outcome)

    def forget_outcome(self) -> None:
        """Before ranks start: how the life before ended is not how this one does."""
        self.outcome.unlink(missing_ok=True)
        self.hang.unlink(missing_ok=True)

    def begin_life(
        self,
        began: float,
        resumed_from: int | None,
        world: int,
        sequence: int,
        device: str,
        plan: str,
        origin: dict[str, Any],
        cost: dict[str, int],
        went_back_to: int | None = None,
    ) -> int:
        """Notes that a process group has started; returns the number of this life, from 1.

        `began`: when its processes did, in seconds since 1970.
        `went_back_to`: the step whose weights it has, where that is not `resumed_from` (train/rollback.py).
        `sequence` (ranks that share packs), `plan` (digest), `origin` (where it took over) and `cost` (coefficients of balance) say which
        packs each rank gets: `xc-data replay` reads them.
        """
        life = self.life() + 1
        start = {"life": life, "event": "start", "time": began, "resumed_from": resumed_from, "world": world, "device": device}
        back = {} if went_back_to is None else {"went_back_to": went_back_to}
        jsonl.append(self.lives, [{**start, **back, "sequence": sequence, "plan": plan, "origin": origin, "cost": cost}])
        return life

    def end_life(self, code: int, reason: str, step: int) -> None:
        """Notes how the process group ended."""
        jsonl.append(self.lives, [{"life": self.life(), "event": "end", "time": time.time(), "code": code, "reason": reason, "step": step}])

    def life(self) -> int:
        """Number of the newest life; 0 before the first."""
        return max((e["life"] for e in self.events()), default=0)

    def events(self) -> list[dict[str, Any]]:
        """Starts and ends of lives, in order."""
        return jsonl.read(self.lives)

    def lived_s(self) -> float:
        """Wall time of the lives until now, in seconds; of one that nobody saw end, until its last step."""
        events = self.events()
        starts = {e["life"]: e["time"] for e in events if e["event"] == "start"}
        ends = {e["life"]: e["time"] for e in events if e["event"] == "end"}
        if starts.keys() - ends.keys():
            last = {line["life"]: line["time"] for line in jsonl.read(self.metrics)}
            ends = {**last, **ends}
        return sum(max(0.0, ends.get(life, start) - start) for life, start in starts.items())

    def last_step(self) -> int:
        """The step of the heartbeat."""
        return int((read_json(self.heartbeat) or {}).get("step", 0))

    def beat(self, step: int, phase: str) -> None:
        """Says that rank 0 is alive and where it is."""
        write_json(self.heartbeat, {"step": step, "phase": phase, "time": time.time()})


def in_use(run: RunDir) -> bool:
    """Whether another process holds a run directory. Where the file system knows no locks, nothing tells."""
    if not run.lock.exists():
        return False
    with run.lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return False


@contextmanager
def own(run: RunDir) -> Iterator[None]:
    """Holds the run directory; the lock dies with this process.

    Raises:
        UserError: another process holds it.
    """
    with run.lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run.path} is in use by a running job (wait for it, or touch {run.stop_file})") from None
        except OSError as error:
            cure = "choose a run.dir whose file system knows flock: Lustre does where it is mounted with -o flock"
            raise UserError(f"{run.lock} cannot be locked: {error.strerror} ({cure})") from None
        lock.truncate(0)  # a Slurm job that holds it has its number there, by which its next life knows it (slurm/job.sbatch.j2)
        yield


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` in one step."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step."""
    write_atomic(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any | None:
    """A JSON file; None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync_tree(folder: Path) -> None:
    """Forces a folder's files to disk, so that it can be renamed into place."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
