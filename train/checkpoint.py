"""Checkpoints: written beside, verified, renamed; a checkpoint is complete or invisible.

    checkpoints/step-N/   the engine's files, rng-R.pt by rank, state.json (step, cursor, digests), manifest.json (size, sha256)
    checkpoints/latest    name of the newest complete one; only a hint for people, resume looks for itself

Invariant: a manifest is written last, over what every rank wrote; the state is that of the last *consumed* step.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from data_pipeline.errors import UserError
from data_pipeline.plan.origin import Cursor, Drawn, Origin
from train import reshape
from train.config import CheckpointConfig
from train.engine import Engine, Files
from train.intact import PREFIX, is_good, newest_first
from train.ranks import Ranks
from train.run_dir import RunDir, file_digest, fsync_tree, write_atomic

VERSION = 3
_CRASH = "no checkpoint "
Written = dict[str, tuple[int, str]]
"""What a rank wrote, by the file's name in the folder: bytes, and their SHA-256."""


@dataclass(frozen=True)
class TrainState:
    """What a resumed run needs besides weights and optimizer."""

    step: int
    """Steps done."""
    cursor: tuple[int, int]
    """Where the next step begins."""
    drawn: Drawn
    """Draws by source around the cursor: with another mix, the run goes on from them."""
    origin: Origin
    """Where the plan took over from another one; the start of the run, as a rule."""
    progress: float
    totals: dict[str, int]
    """Counters since the start of the run: tokens, samples, dropped samples, skipped steps."""
    guard: dict[str, Any]
    """Statistics of the guard."""
    plan_digest: str
    base_digest: str | None
    """Digest of the weights that the stage began from; frozen ones are not in the checkpoint."""
    world: int
    zero_stage: int
    dtype: str
    version: int = VERSION

    @property
    def next_cursor(self) -> Cursor:
        """The cursor as the plan takes it."""
        return Cursor(*self.cursor)


class Writer:
    """Writes checkpoints in the background: the loop waits for the copy out of the model, the next save for the one before.

    Invariant: at most one checkpoint is being written, and it is that of its moment, whatever training does meanwhile.
    """

    def __init__(self, run: RunDir, engine: Engine, ranks: Ranks, config: CheckpointConfig) -> None:
        self._run, self._engine, self._ranks, self._config = run, engine, ranks, config
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(self, state: TrainState) -> None:
        """Begins a checkpoint. All ranks call it; only rank 0 makes it visible.

        Raises:
            UserError: as `check`; or a folder cannot be made.
        """
        self.wait()
        name = f"{PREFIX}{state.step:08d}"
        partial = self._run.checkpoints / f".{name}.partial"
        try:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            self._ranks.barrier()
            files = {**self._engine.snapshot(self._run.checkpoints, partial.name), partial / f"rng-{self._ranks.rank}.pt": _rng_state()}
        except OSError as error:
            raise UserError(self._refusal(name, error)) from None
        self._thread = threading.Thread(target=self._write, args=(files, partial, name, state), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when what was begun is complete.

        Raises:
            UserError: as `check`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Costs nothing; for every step.

        Raises:
            UserError: the file system refused the last checkpoint (full, read-only), on whichever rank; those before are untouched.
            RuntimeError: something else went wrong with it.
        """
        if self._problem:
            raise (RuntimeError if self._problem.startswith(_CRASH) else UserError)(self._problem)

    def _write(self, files: Files, partial: Path, name: str, state: TrainState) -> None:
        ranks = self._ranks.in_background()
        try:
            own: Written = {}
            problem = self._trying(name, lambda: own.update(_write_files(files, partial)))
            found = ranks.gather((problem, own))
            # One whose disk is full knows why; another may only see that its folder is gone.
            problem = min((of_rank for of_rank, _ in found if of_rank), key=lambda why: why.startswith(_CRASH), default=None)
            if problem is None and ranks.rank == 0:
                written = {file: facts for _, of_rank in found for file, facts in of_rank.items()}
                problem = self._trying(name, lambda: publish(self._run, partial, name, state, self._config, written))
            if problem and ranks.rank == 0:  # no rank writes any more
                shutil.rmtree(partial, ignore_errors=True)
            self._problem = ranks.share(problem)
        except RuntimeError as error:  # another rank is gone
            self._problem = f"{_CRASH}{name}: {error!r}"

    def _trying(self, name: str, work: Callable[[], None]) -> str | None:
        """What hindered the work, in a line for the user."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever it was, the other ranks must hear of it
            return self._refusal(name, error) if _is_storage_error(error) else f"{_CRASH}{name}: {error!r}"
        return None

    def _refusal(self, name: str, error: Exception) -> str:
        reason = _storage_reason(self._run, error)
        cure = "free space, or mend the file system, and run the same command: it goes on from the checkpoint before"
        return f"cannot write checkpoint {self._run.checkpoints / name}: {reason} ({cure})"


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        UserError: it was written by another version of this package.
    """
    fields = json.loads((folder / "state.json").read_text())
    if fields["version"] != VERSION:
        raise UserError(f"{folder} has version {fields['version']}, this is {VERSION}: use a new run.dir")
    plan = {"cursor": tuple(fields["cursor"]), "drawn": Drawn(**fields["drawn"]), "origin": Origin(**fields["origin"])}
    return TrainState(**{**fields, **plan})


def load(folder: Path, engine: Engine, ranks: Ranks, state: TrainState, run: RunDir, alive: Callable[[], None]) -> None:
    """Puts weights, optimizer and random state of a checkpoint in place, of another number of ranks too.

    `alive` is called while a conversion for these ranks gets on.
    """
    if state.world != ranks.world:
        if reshape.is_whole(state.zero_stage, state.dtype):
            engine.load(folder.parent, folder.name)
        else:
            copy = reshape.converted(folder, run, ranks, alive)
            engine.load(copy.parent, copy.name)
            ranks.barrier()
            if ranks.rank == 0:
                shutil.rmtree(copy)
        torch.manual_seed(torch.initial_seed() + state.step)  # nobody's random state fits; dropout must not repeat itself all the same
        return
    engine.load(folder.parent, folder.name)
    found = torch.load(folder / f"rng-{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(found["cpu"])
    if "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"])


_AS_GIVEN = {"torch.bfloat16": "bf16", "torch.float32": "fp32"}
"""What `train.precision` calls a number format."""


def require_same(state: TrainState, now: TrainState, folder: Path) -> None:
    """Refuses a checkpoint that this run cannot go on from.

    Raises:
        UserError: what differs, and the way out.
    """
    if state.plan_digest != now.plan_digest:
        raise UserError(
            f"{folder}: the data changed since (plan {state.plan_digest[:12]}, now {now.plan_digest[:12]}): use a new run.dir, "
            "or go on under the new plan with data.change=repeat or data.change=skip"
        )
    if state.base_digest != now.base_digest:
        raise UserError(f"{folder}: run.init_from holds other weights than the stage began from: use a new run.dir")
    fixed = [("dtype", "train.precision")]
    if not reshape.goes_on(state.zero_stage, state.dtype, now.zero_stage, state.world == now.world):
        fixed += [("zero_stage", "deepspeed.stage"), ("world", "--procs")]
    for name, key in fixed:
        before, ours = (_AS_GIVEN.get(value, value) for value in (getattr(state, name), getattr(now, name)))
        if before != ours:
            raise UserError(f"{folder} was written with {key} {before}, not {ours}: use the same, or a new run.dir")


class _Digested:
    """A file that knows how much was written into it, and its SHA-256: of what came in, whatever reaches the disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """All of it, as a buffered file does."""
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """As a file does."""
        self._file.flush()

    @property
    def facts(self) -> tuple[int, str]:
        """Of what was written."""
        return self.size, self._digest.hexdigest()


def _write_files(files: Files, partial: Path) -> Written:
    """Writes this rank's files to the disk.

    Raises:
        OSError: the file system refused; a network file system may do so as late as the sync.
    """
    written: Written = {}
    for path, content in files.items():
        with path.open("wb") as file:
            digested = _Digested(file)
            torch.save(content, digested)
            file.flush()
            os.fsync(file.fileno())
        written[str(path.relative_to(partial))] = digested.facts
    return written


def publish(run: RunDir, partial: Path, name: str, state: TrainState, config: CheckpointConfig, written: Written) -> None:
    """Makes a folder of written files a complete checkpoint, and removes those that are no longer kept.

    The newest good one stays: it is what the guard goes back to. `written`: the files that ranks wrote into the folder; of others the
    digest is taken here.

    Raises:
        OSError: one of them is not there, or has another size: a manifest of what is left would make a damaged checkpoint a complete one.
    """
    for file, (size, _) in sorted(written.items()):
        _require_written(partial, file, size)
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    files = {str(p.relative_to(partial)): p for p in partial.rglob("*") if p.is_file()}
    facts = {**{file: (path.stat().st_size, file_digest(path)) for file, path in files.items() if file not in written}, **written}
    manifest = {file: dict(zip(("size", "sha256"), facts[file], strict=True)) for file in sorted(facts)}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fsync_tree(partial)
    target = run.checkpoints / name
    if target.exists():  # written by an earlier life that was passed over
        _remove(target)
    partial.replace(target)
    write_atomic(run.checkpoints / "latest", name.encode())
    _retire(run, config)


def _retire(run: RunDir, config: CheckpointConfig) -> None:
    """Removes the checkpoints that are no longer kept. The new one is there: what fails is left to the next."""
    try:
        found = newest_first(run)
        good = next((folder for folder in found if is_good(folder)), None)
    except OSError:  # as long as it is not known which is good, none goes
        return
    for old in found[config.keep_last :]:
        kept = config.keep_every and int(old.name.removeprefix(PREFIX)) % config.keep_every == 0
        if old != good and not kept:
            with suppress(OSError):
                _remove(old)


def _remove(folder: Path) -> None:
    """Makes a checkpoint invisible at once; what somebody still reads of it is swept away by a later life."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _require_written(partial: Path, file: str, size: int) -> None:
    try:
        with (partial / file).open("rb") as opened:  # opening asks the server: what a network file system remembers may be old
            found = os.fstat(opened.fileno()).st_size
    except FileNotFoundError:
        raise OSError(errno.ENOENT, f"{file} was written by a rank and cannot be seen by rank 0") from None
    if found != size:
        raise OSError(errno.EIO, f"{file} has {found} bytes, of {size} that a rank wrote")


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _is_storage_error(error: BaseException | None) -> bool:
    """Whether the file system refused. torch's writer has no errno: it is known by what it says, or by what came before it."""
    if error is None:
        return False
    writer = any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter", "iostream error"))
    return writer or isinstance(error, OSError) or _is_storage_error(error.__context__)


def _storage_reason(run: RunDir, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"the file system refused, {shutil.disk_usage(run.path).free / 1e6:.0f} MB are free"
