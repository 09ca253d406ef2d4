"""A selection: the samples of a source that are used, as a folder that a config names (`data.sources.NAME.selection`).

    selection.json  what it was made of and by which command, how many samples, and its digest
    kept.bin        int64 [K], rows of the source, ascending
    blocks.bin      int64 [B+1], selected ordinal at which each physical block of the source begins

Invariant: the folder appears whole or not at all and is never changed; it holds for the one index of its source whose digest it names.
Blocks stay those of the source, so that leaving out a sample moves no other.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError, cannot_read
from data_pipeline.plan.columns import PlanSource

VERSION = 1
FILE = "selection.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Selection:
    """`selection.json`."""

    source: str
    """Digest of the source's index."""
    digest: str
    """Of the rows alone: two ways to the same samples are the same selection."""
    made_by: str
    """The command."""
    samples: int
    of: int
    """Usable samples of the source."""
    text_tokens: int
    images: int
    left_out: dict[str, int] = field(default_factory=dict)
    """How many samples each criterion left out, in the order in which they were applied."""
    version: int = VERSION


def write(source: PlanSource, rows: Iterable[np.ndarray], left_out: dict[str, int], made_by: str, folder: Path) -> Selection:
    """Writes a selection.

    Args:
        source: the whole source, opened without a selection.
        rows: int64 rows to use in ascending order, in chunks.
        left_out: samples by criterion; filled, at the latest, when `rows` is exhausted.
        made_by: the command that makes it again.
        folder: must not exist.

    Raises:
        UserError: nothing is selected, the folder exists, or it cannot be written.
    """
    require_new(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        made = _write(source, rows, left_out, made_by, partial)
        require_new(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the selection {folder}: {error.strerror} (free space, or choose another place: -o)") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return made


def require_new(folder: Path) -> None:
    """Refuses a name that is taken.

    Raises:
        UserError: something is there.
    """
    if folder.exists():
        raise UserError(f"{folder} exists (remove it, or choose another name: -o)")


def read(folder: Path, source: str, where: str) -> Selection:
    """A selection of the source with this digest; `where` is the config key that names it.

    Raises:
        UserError: it is none, or it was made of another index.
        TryAgainError: the file system failed.
    """
    file = folder / FILE
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{where}: no selection {folder.resolve()} (make it: xc-data select SOURCE --where SQL -o {folder})") from None
    except OSError as error:
        raise cannot_read(file, error) from None
    except ValueError as error:
        raise UserError(f"{where}: {file} unreadable: {error} (remove it, then run xc-data select again)") from None
    if not isinstance(raw, dict) or raw.get("version") != VERSION or {f.name for f in fields(Selection)} != raw.keys():
        raise UserError(f"{where}: {file} is of another version (remove it, then run xc-data select again)")
    found = Selection(**raw)
    if found.source != source:
        raise UserError(
            f"{where}: {folder} was made of another index of its source, which was indexed again since "
            f"(remove it, then run: {found.made_by})"
        )
    if not _whole(folder, found.samples):
        raise UserError(f"{where}: rows of {folder} are missing or cut short (remove it, then run: {found.made_by})")
    return found


def _whole(folder: Path, samples: int) -> bool:
    try:
        starts = np.fromfile(folder / "blocks.bin", "<i8")
        return len(starts) > 0 and starts[-1] == samples and (folder / "kept.bin").stat().st_size == 8 * samples
    except FileNotFoundError:
        return False
    except OSError as error:
        raise cannot_read(folder, error) from None


def _write(source: PlanSource, rows: Iterable[np.ndarray], left_out: dict[str, int], made_by: str, folder: Path) -> Selection:
    first_rows = _first_rows(source)
    counts = np.zeros(len(first_rows), np.int64)
    digest, samples, text_tokens, images = hashlib.sha256(), 0, 0, 0
    with (folder / "kept.bin").open("wb") as file:
        for chunk in rows:
            content = chunk.astype("<i8").tobytes()
            file.write(content)
            digest.update(content)
            counts += np.bincount(np.searchsorted(first_rows, chunk, "right") - 1, minlength=len(counts))
            _, elements = source.elements(chunk)
            samples += len(chunk)
            text_tokens += int(elements["tokens"].sum())
            images += int((elements["width"] > 0).sum())
        file.flush()
        os.fsync(file.fileno())
    of = int(source.block_starts[-1])
    if not samples:
        by = ", ".join(f"{criterion} left out {count}" for criterion, count in left_out.items())
        raise UserError(f"none of {of} samples is selected: {by} (loosen the criteria)")
    made = Selection(source.digest, digest.hexdigest(), made_by, samples, of, text_tokens, images, left_out)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
    for name, content in (("blocks.bin", starts.tobytes()), (FILE, json.dumps(asdict(made), indent=1).encode())):
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return made


def _first_rows(source: PlanSource) -> np.ndarray:
    """int64 [B]: the row at which each block of a whole source begins."""
    found, starts = [], source.block_starts
    for first in range(0, int(starts[-1]), _CHUNK):
        kept = source.kept(first, min(first + _CHUNK, int(starts[-1])))
        inside = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + len(kept))]
        found.append(kept[inside - first])
    return np.concatenate(found)
