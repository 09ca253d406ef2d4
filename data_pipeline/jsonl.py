"""Files of one JSON object a line, written by processes that may be killed at any moment.

Invariant: a line cut by a kill harms no other line: it is left out when read, and the next append starts on a line of its own.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(path: Path, values: Iterable[Any]) -> None:
    """Adds a line a value, behind a fragment that a kill may have left."""
    with path.open("ab+") as file:
        cut = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if cut else b"") + b"".join(json.dumps(value).encode() + b"\n" for value in values))


def read(path: Path) -> list[Any]:
    """The whole lines; none where there is no file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
