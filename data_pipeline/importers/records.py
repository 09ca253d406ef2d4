"""Records of JSON files: a line each, or one list of them, read as a stream whatever the size.

Invariant: record i of a file is the same value, or the same reason why not, for every task; a task sees those with i % tasks == task.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import cannot_read
from data_pipeline.samples import BadSample

CHUNK = 1 << 20
RECORD_LIMIT = 1 << 28
"""Characters of the longest record that is looked for."""


def records(path: Path, task: int = 0, tasks: int = 1) -> Iterator[tuple[int, dict[str, Any] | BadSample]]:
    """(row, record) of the task's rows; what is no record comes as the reason.

    Raises:
        TryAgainError: the file system failed.
    """
    try:
        with path.open("rb") as file:
            start = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            rows = _list if start == b"[" else _lines
        with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for row, value in rows(file, task, tasks):
                if not isinstance(value, (dict, BadSample)):
                    value = BadSample("not a record: no JSON object")
                yield row, value
    except OSError as error:
        raise cannot_read(path, error) from None


def _lines(file: IO[str], task: int, tasks: int) -> Iterator[tuple[int, Any]]:
    row = -1
    for line in file:
        if not line.strip():
            continue
        row += 1
        if row % tasks != task:
            continue
        try:
            yield row, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield row, BadSample(f"not a record: {error}")


def _list(file: IO[str], task: int, tasks: int) -> Iterator[tuple[int, Any]]:
    """Elements of a list; where one cannot be read nobody knows where the next begins, and the rest of the file is one reason."""
    decoder = json.JSONDecoder()
    buffer, row = file.read(CHUNK), 0
    at = buffer.index("[") + 1
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            if row % tasks == task and _more(file, buffer[at + 1 :]):
                yield row, BadSample("the list ends, and more follows it")
            return
        value, end, failed = None, len(buffer), ""
        try:
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            failed = str(error)
        if end == len(buffer):  # perhaps only what was read ends here; reads double, so that a long record costs no squares
            left = len(buffer) - at
            more = file.read(max(CHUNK, left)) if left < RECORD_LIMIT else ""
            buffer, at, end = buffer[at:] + more, 0, left
            if more:
                continue
        if failed:
            if row % tasks == task:
                yield row, BadSample(f"the list breaks off, or is no JSON from here on: {failed}")
            return
        if row % tasks == task:
            yield row, value
        row, at = row + 1, end


def _more(file: IO[str], rest: str) -> bool:
    """Whether anything but white space is left, in what was read or behind it."""
    while not rest.strip():
        rest = file.read(CHUNK)
        if not rest:
            return False
    return True
