"""Writes one task of an import: samples into WebDataset tars of bounded size, and what could not be used into a list.

Invariant: a folder shows a task's shards only when the whole task is written, and the task's marker comes last. So a task that was
killed is done anew from nothing, one that is whole is passed over, and two tasks never write the same name. Same input, same bytes.

    part-00003-000012.tar         shard 12 of task 3
    import.json                   what is imported into this folder, and by how many tasks
    import-done-00003.json        the marker of task 3: its shards and counts
    import-damaged-00003.jsonl    what task 3 left out, and why
    .part-00003/                  task 3 while it is written
"""

import errno
import fcntl
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import TryAgainError, UserError

ABOUT = "import.json"


@dataclass(frozen=True)
class Sample:
    """A sample to be written."""

    key: str
    """Unique in its source, whatever the number of tasks; holds no dot."""
    members: Mapping[str, bytes]
    """Bytes by extension, as `data_pipeline.samples.parse` reads them."""


@dataclass(frozen=True)
class Refused:
    """What an import left out."""

    file: str
    row: int
    """Row of the file, from 0."""
    reason: str
    count: int = 1
    """Rows that it stands for."""


@dataclass(frozen=True)
class Limits:
    """Where a shard ends: behind the sample that reaches one of these."""

    samples: int = 10_000
    bytes: int = 1 << 30


@dataclass
class TaskReport:
    """The marker of a finished task."""

    shards: dict[str, int] = field(default_factory=dict)
    """Bytes by name."""
    samples: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows by class of reason, which is what comes before the colon."""


class ShardWriter:
    """The shards of one task, in a folder of their own."""

    def __init__(self, folder: Path, task: int, limits: Limits) -> None:
        self.shards: dict[str, int] = {}
        self._folder, self._task, self._limits = folder, task, limits
        self._file: IO[bytes] | None = None
        self._samples = 0

    def write(self, sample: Sample) -> None:
        """Adds a sample, in a new shard where the last one is full."""
        if self._file is None:
            import webdataset  # here, since it takes seconds, which who only asks whether an import is whole need not wait

            self._file = (self._folder / f"part-{self._task:05d}-{len(self.shards):06d}.tar").open("xb")
            # without a time and in the format that webdataset itself takes, the same samples are the same bytes
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, format=tarfile.USTAR_FORMAT)
            self._samples = 0
        self._tar.write({"__key__": sample.key, **sample.members})
        self._samples += 1
        if self._samples >= self._limits.samples or self._file.tell() >= self._limits.bytes:
            self.close()

    def close(self) -> None:
        """Ends the open shard, on disk to the last byte."""
        if self._file is None:
            return
        self._tar.close()
        _sync(self._file)
        self.shards[Path(self._file.name).name] = self._file.tell()
        self._file.close()
        self._file = None


def write_task(
    folder: Path, about: Mapping[str, Any], task: int, tasks: int, found: Iterable[Sample | Refused], limits: Limits | None = None
) -> tuple[TaskReport, bool]:
    """Writes a task's share of an import; returns what it holds, and whether it was written now rather than found whole.

    Args:
        folder: where the shards go; made if it is not there.
        about: what is imported, in plain values: two imports do not mix in one folder.
        task: number of this task, from 0.
        tasks: how many tasks the import has.
        found: the task's samples and what it leaves out, in an order that is the same every time; not touched if the task is whole.
        limits: where shards end.

    Raises:
        UserError: the folder holds something else or cannot be written, or of the whole import no sample could be used.
        TryAgainError: another process is at this task.
    """
    about = {**about, "tasks": tasks}
    try:
        _require_same_import(folder, about)
        report = _finished(folder, task)
        if report is not None:
            return report, False
        with _staging(folder, task) as staging:
            report = _finished(folder, task)  # by the process that held the lock
            if report is not None:
                return report, False
            report = _fill(staging, task, tasks == 1, found, limits or Limits())
            _require_same_import(folder, about)
            _publish(folder, staging, task, about, report)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror} (free space, or choose another folder)") from None
    return report, True


def require_whole(folder: Path) -> None:
    """Refuses a folder that is being imported into.

    Raises:
        UserError: tasks are missing.
    """
    about = _read(folder / ABOUT)
    if about is None:
        return
    missing = [task for task in range(about["tasks"]) if _finished(folder, task) is None]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {about['tasks']} import tasks are not done, first {missing[0]} "
            f"(run: xc-data import {about.get('layout', 'LAYOUT')} ... --task {missing[0]}/{about['tasks']})"
        )


def _fill(staging: Path, task: int, alone: bool, found: Iterable[Sample | Refused], limits: Limits) -> TaskReport:
    writer, report, left_out = ShardWriter(staging, task, limits), TaskReport(), Counter[str]()
    first = ""
    with (staging / _damaged_name(task)).open("w", encoding="utf-8") as damaged:
        for item in found:
            if isinstance(item, Sample):
                writer.write(item)
                report.samples += 1
            else:
                reason = item.reason.encode("utf-8", "backslashreplace").decode()  # it may quote half a surrogate pair
                damaged.write(json.dumps({**asdict(item), "reason": reason}) + "\n")
                left_out[reason.partition(":")[0]] += item.count
                first = first or f"{item.file} row {item.row}: {reason}"
    writer.close()
    if first and not report.samples and alone:  # a small share of an array may well hold nothing but damage
        raise UserError(f"nothing to import: all was left out, {left_out.total()} times, first {first} (mend the data or the options)")
    report.shards, report.left_out = writer.shards, dict(left_out)
    return report


def _publish(folder: Path, staging: Path, task: int, about: Mapping[str, Any], report: TaskReport) -> None:
    _write(staging, folder / ABOUT, about)
    damaged = staging / _damaged_name(task)
    if report.left_out:
        damaged.replace(folder / damaged.name)
    for name in report.shards:
        (staging / name).replace(folder / name)
    _write(staging, folder / _done_name(task), asdict(report))


def _finished(folder: Path, task: int) -> TaskReport | None:
    """The report of a task whose marker and shards are all there."""
    found = _read(folder / _done_name(task))
    if not isinstance(found, dict) or found.keys() != {f.name for f in fields(TaskReport)}:
        return None
    sizes = {name: (folder / name).stat().st_size for name in found["shards"] if (folder / name).exists()}
    return TaskReport(**found) if sizes == found["shards"] else None


def _require_same_import(folder: Path, about: Mapping[str, Any]) -> None:
    other = _read(folder / ABOUT)
    if other is None:
        if any(folder.glob("*.tar")):
            raise UserError(f"{folder.resolve()} holds shards already (choose an empty folder)")
        return
    different = next((key for key in about if about[key] != other.get(key)), None)
    if different:
        raise UserError(
            f"{folder.resolve()} holds an import with another value of {different}: "
            f"{other.get(different)!r}, not {about[different]!r} (choose an empty folder, or delete that one)"
        )


@contextmanager
def _staging(folder: Path, task: int) -> Iterator[Path]:
    """A fresh folder for the task, which no other process has at the same time; gone when done with."""
    staging = folder / f".part-{task:05d}"
    with _locked(staging / "lock", f"task {task} of {folder}"):
        for left in staging.iterdir():
            if left.name != "lock":
                left.unlink()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise TryAgainError(f"{what} is being imported by another process (wait for it, or end it)") from None
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                # a file system without locks: job arrays start each task once
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its last holder took it away
                yield
                return


def _done_name(task: int) -> str:
    return f"import-done-{task:05d}.json"


def _damaged_name(task: int) -> str:
    return f"import-damaged-{task:05d}.jsonl"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error} (delete it, and run the import again)") from None


def _write(staging: Path, target: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file beside, then renames."""
    partial = staging / f".{target.name}"
    with partial.open("wb") as file:
        file.write(json.dumps(value, indent=1).encode())
        _sync(file)
    partial.replace(target)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
