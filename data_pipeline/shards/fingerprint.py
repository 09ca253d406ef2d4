"""What curation compares of an element: a digest of an image's bytes or of a text's words, and a perceptual hash of an image's looks.

Invariant: the same bytes have the same fingerprints on every machine; none of them enters the digest of an index, so that asking for
perceptual hashes later changes no run, unless pictures turn out not to decode, which is damage.
"""

import hashlib
import io
import unicodedata

import numpy as np
from PIL import Image

from data_pipeline.samples import IMAGE_FORMATS, BadSample

DIGEST_BYTES = 16
"""Of a digest of an element: two of a billion collide with a chance of 1e-21."""
PHASH_BITS = 64

_SIDE = 32
"""Pixels of the small grey square that a perceptual hash looks at."""
_FLAT = 0.5
"""Deviation, in grey levels of 0..255, below which a picture has no looks to compare."""


def image_digest(data: bytes) -> bytes:
    """Digest of an image's bytes: equal for copies of one file, however they are named."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def text_digest(text: str) -> bytes:
    """Digest of a text's words: equal for texts that differ in case, white space or Unicode form (NFKC) alone."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(words.encode()).digest()[:DIGEST_BYTES]


def phash(data: bytes) -> int | None:
    """64 bits that change little when a picture is scaled or encoded anew; None where it is flat, and so looks like nothing.

    Bit i says whether the i-th lowest frequency of the picture's DCT lies above the median of all 64 (Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010, with the frequencies taken in the order of a zigzag).

    Raises:
        BadSample: the picture does not decode.
    """
    small = _grey(data)
    if small.std() < _FLAT:
        return None
    frequencies = (_DCT @ (small - small.mean()) @ _DCT.T)[_ROWS, _COLUMNS]
    bits = np.packbits(frequencies > np.median(frequencies))
    return int.from_bytes(bits.tobytes(), "big")


def _grey(data: bytes) -> np.ndarray:
    """[32, 32] float64, as stored (no EXIF rotation), alpha over white."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.draft("L", (2 * _SIDE, 2 * _SIDE))  # a JPEG is decoded at the smallest scale that still has twice the pixels
            picture: Image.Image = image
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            elif image.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # PIL would clip at 255
            small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise whatever hostile bytes lead them to (struct.error, KeyError, ...)
        raise BadSample(f"image does not decode: {error}") from None
    return np.asarray(small, np.float64)


def _zigzag() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the 64 lowest frequencies but the mean."""
    places = sorted(((u, v) for u in range(_SIDE) for v in range(_SIDE)), key=lambda p: (p[0] + p[1], p[0]))
    rows, columns = zip(*places[1 : PHASH_BITS + 1], strict=True)
    return np.array(rows), np.array(columns)


_ROWS, _COLUMNS = _zigzag()
_DCT = np.cos(np.pi * np.outer(np.arange(max(*_ROWS, *_COLUMNS) + 1), np.arange(_SIDE) + 0.5) / _SIDE)
