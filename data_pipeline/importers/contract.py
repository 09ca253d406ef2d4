"""What every importer is: one function from a list of files to samples, which knows which share of them is its own.

Invariant: the samples of all tasks together, and their keys, do not depend on how many tasks there are. Input that cannot be used
becomes a `Refused` and the import goes on; only a file system that fails, or a user's mistake, ends it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.shards.index import SUFFIX as SIDECAR
from data_pipeline.shards.write import Refused, Sample


@dataclass(frozen=True)
class Options:
    """What an importer may be told beside its files."""

    images: Path
    """Folder below which image files lie; no name in the data leads out of it."""
    image_map: Path | None = None
    """What says which file holds the image of a URL."""
    image_column: str | None = None
    """Column of images; guessed if None."""
    text_column: str | None = None
    """Column of captions; guessed if None."""


Importer = Callable[[Sequence[Path], Options, int, int], Iterator[Sample | Refused]]
"""`samples(files, options, task, tasks)`: the share of task `task` of `tasks`, in a fixed order."""


def input_files(source: Path, suffixes: Sequence[str], but: Path | None = None) -> list[Path]:
    """The file, or the files below the folder that end in one of `suffixes`, in the order of their names; none of those below `but`.

    Raises:
        UserError: there are none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"nothing to import: no {source.resolve()} (mend the path)")
    files = [f for f in sorted(source.rglob("*")) if f.suffix in suffixes and not f.name.endswith(SIDECAR) and f.is_file()]
    files = [f for f in files if but is None or not f.resolve().is_relative_to(but.resolve())]
    if not files:
        raise UserError(f"nothing to import: no {' or '.join(suffixes)} file in {source.resolve()} (give the file, or its folder)")
    return files


def key_of(file: int, row: int) -> str:
    """The key of a sample: number of its file and row in it, so that it is found again in the original."""
    return f"{file:05d}-{row:09d}"
