"""Pictures as this room passes them on: encoded bytes with a name and, where there is one, a caption.

Invariant: a picture that is here decodes; a file that does not is refused in one line, before a model is loaded.
"""

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.read.images import decode
from data_pipeline.samples import BadSample, image_size

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """One encoded image."""

    name: str
    """File name, or key of the sample; for people."""
    data: bytes
    caption: str | None = None
    """What is known about it: its text in a collection, or in the `.txt` beside it."""

    @property
    def digest(self) -> str:
        """The same bytes under two names are one picture."""
        return hashlib.sha256(self.data).hexdigest()


def read(paths: Sequence[str | Path]) -> list[Picture]:
    """Pictures from files.

    Raises:
        UserError: one is missing, or does not decode.
    """
    return [_read(Path(path)) for path in paths]


def _read(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"no picture at {path.absolute()}: {error.strerror} (check the path)") from None
    return decoded(os.fsencode(path.name).decode(errors="replace"), data, str(path.absolute()))


def read_told(paths: Sequence[str | Path]) -> list[Picture]:
    """As `read`, with the texts beside them as captions.

    Raises:
        UserError: as `read`, or such a text cannot be read.
    """
    found = []
    for path, picture in zip(paths, read(paths), strict=True):
        try:
            found.append(replace(picture, caption=told_beside(Path(path))))
        except OSError as error:
            raise UserError(f"the text beside {path} cannot be read: {error.strerror} (let this user read it, or move it away)") from None
    return found


def told_beside(path: Path) -> str | None:
    """The text of the `.txt` beside a picture; None where there is none, or no words in it.

    Raises:
        OSError: it cannot be read.
    """
    beside = path.with_suffix(".txt")
    return (beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else "") or None


def decoded(name: str, data: bytes, where: str) -> Picture:
    """A picture from its bytes; `where` they stood is for the message.

    Raises:
        UserError: they do not decode.
    """
    try:
        image_size(data)  # refuses more than decoding does: what the model reads first
        decode(data)
    except BadSample:
        raise UserError(f"{where} does not decode as a picture (give a whole {', '.join(e[1:] for e in EXTENSIONS)})") from None
    return Picture(name, data)


def data_uri(picture: Picture, side: int) -> str:
    """The picture as a page holds it: upright, on white, no side longer than `side` pixels."""
    image = decode(picture.data)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
