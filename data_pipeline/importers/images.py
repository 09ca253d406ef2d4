"""Images of foreign data: files below one folder, and the member that an encoded image becomes.

Invariant: no name in foreign data reads anything outside the folder: not by `..`, an absolute path or a link.
"""

import errno
import io
from pathlib import Path

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.read.images import decode
from data_pipeline.samples import BadSample, image_size

FILE_LIMIT = 1 << 29
"""Bytes of the largest image file that is read."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png"}
_OF_THE_DATA = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EINVAL)
"""Errors that name, file or rights cause and that come again; others may pass."""


class ImageFolder:
    """The folder below which image files lie."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"no such image folder: {root.resolve()} (mend --images)")
        self._root = root.resolve()

    def read(self, name: str) -> bytes:
        """The bytes of a file by its path below the folder.

        Raises:
            BadSample: it is not there, is no file, is too large, or lies outside.
            TryAgainError: the file system failed.
        """
        shown = name[:200]
        try:
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root):
                raise BadSample(f"image outside the image folder: {shown}")
            if not path.is_file():
                raise BadSample(f"image not found: {shown}")
            if path.stat().st_size > FILE_LIMIT:
                raise BadSample(f"image file too large: {shown}")
            return path.read_bytes()
        except OSError as error:
            if error.errno not in _OF_THE_DATA:
                raise TryAgainError(
                    f"cannot read image {shown}: {error.strerror} (mend the file system, then run the same again)"
                ) from None
            raise BadSample(f"image not found: {shown}: {error.strerror}") from None
        except (ValueError, RuntimeError) as error:  # a NUL in the name; a circle of links
            raise BadSample(f"image not found: {shown!r}: {error}") from None


def image_member(data: bytes) -> tuple[str, bytes]:
    """Extension and bytes of an image; formats that shards do not hold become PNG, first frame, in RGB.

    Raises:
        BadSample: it is no image, or too large.
    """
    image_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp", data
    extension = next((e for magic, e in _MAGIC.items() if data.startswith(magic)), None)
    if extension:
        return extension, data
    png = io.BytesIO()
    decode(data).save(png, "PNG")
    return "png", png.getvalue()
