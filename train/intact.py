"""Which checkpoints of a run can be trusted: each is read against its manifest, the newest first.

Invariant: what `find` returns has passed its manifest, on all ranks alike; what has not keeps no name that a whole one could need. Where
one cannot be read nothing is known of it: no older one takes its place.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import TryAgainError
from train.ranks import Ranks
from train.run_dir import RunDir, file_digest, read_json

PREFIX = "step-"
UNREADABLE = "cannot be read"


def find(run: RunDir, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; all ranks call it. Rank 0 looks what there is, and each file is hashed by one rank.

    What an earlier life could not finish is removed. `say` tells the user what is passed over, and why; what is damaged is renamed, so that
    nothing takes it for the newest again, or keeps it instead of a whole one.

    Raises:
        TryAgainError: one cannot be read, on all ranks.
    """
    if ranks.rank == 0:
        for partial in run.checkpoints.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
    for name in ranks.share([folder.name for folder in newest_first(run)] if ranks.rank == 0 else None):
        folder = run.checkpoints / name
        found = ranks.share(_listed(folder) if ranks.rank == 0 else None)
        if not isinstance(found, str):
            finds = [f for f in ranks.gather(_damage(folder, found[ranks.rank :: ranks.world])) if f]
            found = min(finds, key=lambda f: UNREADABLE in f, default=None)  # what is damaged need not be read
        if found is None:
            return folder
        _require_readable(folder, found)
        if ranks.rank == 0:
            say(f"passed over checkpoint {name}: {found} ({_step_aside(folder)})")
    return None


def newest_good(run: RunDir) -> Path | None:
    """The newest complete checkpoint behind a step that moved the weights.

    Raises:
        TryAgainError: one cannot be read.
    """
    for folder in newest_first(run):
        try:
            good = is_good(folder)
        except OSError as error:
            raise TryAgainError(_unreadable(folder, f"state.json {UNREADABLE}: {error.strerror}")) from None
        found = problem(folder) if good else None
        _require_readable(folder, found or "")
        if good and not found:
            return folder
    return None


def _require_readable(folder: Path, found: str) -> None:
    if UNREADABLE in found:
        raise TryAgainError(_unreadable(folder, found))


def _unreadable(folder: Path, found: str) -> str:
    return f"{folder}: {found} (mend the file system, or move that checkpoint away, and run the same command: it goes on)"


def _step_aside(folder: Path) -> str:
    """Takes its name from a damaged checkpoint; says what became of it."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        folder.rename(aside)
    except OSError as error:
        return f"it keeps its name: {error.strerror}"
    return f"it is {aside.name} now"


def newest_first(run: RunDir) -> list[Path]:
    """The visible checkpoints, complete or damaged since."""
    return sorted(run.checkpoints.glob(f"{PREFIX}*"), reverse=True)


def is_good(folder: Path) -> bool:
    """Whether the last step before a checkpoint moved the weights: those within a row of skipped steps are not gone back to.

    Raises:
        OSError: it cannot be read.
    """
    try:
        state = read_json(folder / "state.json")
        return state is not None and not state["guard"].get("in_a_row")
    except (ValueError, KeyError, TypeError, AttributeError):  # a flipped bit may leave JSON that says something else
        return False


def problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    found = _listed(folder)
    return found if isinstance(found, str) else _damage(folder, found)


def _listed(folder: Path) -> list[tuple[str, str]] | str:
    """The files of a checkpoint with their digests, the largest first, by what can be known without reading them; or why it is none."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            return "no manifest.json"
        facts = [(name, int(of["size"]), str(of["sha256"])) for name, of in manifest.items()]
    except OSError as error:
        return f"manifest.json {UNREADABLE}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    if "state.json" not in manifest:
        return "manifest.json is damaged"
    for name, size, _ in facts:
        path = folder / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} {UNREADABLE}: {error.strerror}"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return [(name, digest) for name, _, digest in sorted(facts, key=lambda of: -of[1])]


def _damage(folder: Path, files: Sequence[tuple[str, str]]) -> str | None:
    for name, digest in files:
        try:
            if file_digest(folder / name) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} {UNREADABLE}: {error.strerror}"
    return None
