"""Checkpoints: written beside, verified, renamed; a checkpoint is complete or invisible.

    checkpoints/step-N/   the engine's files, rng-R.pt by rank, state.json (step, cursor, digests), manifest.json (size, sha256)
    checkpoints/latest    name of the newest complete one; only a hint for people, resume looks for itself

Invariant: what `find` returns has passed its manifest; the state is that of the last *consumed* step.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data_pipeline.errors import UserError
from data_pipeline.plan.origin import Cursor, Drawn, Origin
from train.engine import Engine
from train.ranks import Ranks
from train.run_dir import RunDir, file_digest, fsync_tree, read_json, write_atomic

VERSION = 2
PREFIX = "step-"


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


def save(run: RunDir, engine: Engine, ranks: Ranks, state: TrainState, keep_last: int) -> None:
    """Writes a checkpoint. All ranks call it; only rank 0 makes it visible.

    Raises:
        UserError: the file system refused (full, read-only); what was there before is untouched.
    """
    name = f"{PREFIX}{state.step:08d}"
    partial = run.checkpoints / f".{name}.partial"
    try:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        ranks.barrier()
        engine.save(run.checkpoints, partial.name)
        torch.save(_rng_state(), partial / f"rng-{ranks.rank}.pt")
        ranks.barrier()
        if ranks.rank == 0:
            _publish(run, partial, name, state, keep_last)
        ranks.barrier()
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        if not _is_storage_error(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {run.checkpoints / name}: {_storage_reason(run, error)} "
            "(free space and run the same command: it goes on from the checkpoint before)"
        ) from None


def find(run: RunDir, ranks: Ranks) -> Path | None:
    """The newest complete checkpoint; rank 0 looks and tells the others, so that a file is hashed once.

    What an earlier life could not finish is removed.
    """
    if ranks.rank == 0:
        for partial in run.checkpoints.glob(".*.partial"):
            shutil.rmtree(partial)
    name = ranks.share(_newest_complete(run) if ranks.rank == 0 else None)
    return run.checkpoints / name if name else None


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


def load(folder: Path, engine: Engine, ranks: Ranks) -> None:
    """Puts weights, optimizer and random state of a checkpoint in place."""
    engine.load(folder.parent, folder.name)
    state = torch.load(folder / f"rng-{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


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
    for name, key in (("world", "--procs"), ("zero_stage", "deepspeed.stage"), ("dtype", "train.precision")):
        if getattr(state, name) != getattr(now, name):
            raise UserError(
                f"{folder} was written with {key} {getattr(state, name)}, not {getattr(now, name)}: use the same, or a new run.dir"
            )


def _publish(run: RunDir, partial: Path, name: str, state: TrainState, keep_last: int) -> None:
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1))
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(partial)): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in files}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    fsync_tree(partial)
    target = run.checkpoints / name
    if target.exists():  # written by an earlier life that was passed over
        shutil.rmtree(target)
    partial.replace(target)
    write_atomic(run.checkpoints / "latest", name.encode())
    for old in sorted(run.checkpoints.glob(f"{PREFIX}*"))[:-keep_last]:
        shutil.rmtree(old)


def _newest_complete(run: RunDir) -> str | None:
    for folder in sorted(run.checkpoints.glob(f"{PREFIX}*"), reverse=True):
        found = problem(folder)
        if found is None:
            return folder.name
        print(f"passed over checkpoint {folder.name}: {found}", flush=True)
    return None


def problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ValueError:
        return "manifest.json is damaged"
    if manifest is None:
        return "no manifest.json"
    for name, facts in manifest.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {facts['size']}"
        if file_digest(path) != facts["sha256"]:
            return f"{name} is damaged"
    return None


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
