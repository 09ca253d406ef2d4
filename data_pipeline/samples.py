"""The only place that knows what a sample looks like: raw members of a tar become an ordered list of texts and images.

Invariant: the indexer and the reader call the same `parse`, so what was counted is what is trained on.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, whatever a member calls itself: no format whose decoder starts a program (EPS), none that nobody publishes."""
PIXEL_LIMIT = 178_000_000
"""Largest image, in pixels, that is decoded: PIL's own limit against decompression bombs."""
SCAN_LIMIT = 100
"""Most scans of a JPEG, each of which goes over the whole picture for a few bytes; progressive ones that are meant well have ten or so."""
TEXT_LIMIT = 1 << 22
"""Largest text or JSON member in bytes: a long novel; as tokens or as objects it takes hundreds of times the memory."""
ELEMENT_LIMIT = 10_000
"""Most elements of a document, by the same reasoning."""


class Kind(Enum):
    """What the samples of a source are."""

    pair = "pair"  # K.jpg|jpeg|png|webp + K.txt (+ K.json), as img2dataset writes it
    document = "document"  # K.json with parallel lists `texts` and `images` (OBELICS) + K.0.jpg, ...
    text = "text"  # K.txt


class BadSample(Exception):  # noqa: N818  a fact about data, not a fault of the program
    """The sample cannot be used, now or on any later read; the message says why."""


@dataclass(frozen=True)
class TextElement:
    """A run of words."""

    text: str


@dataclass(frozen=True)
class ImageElement:
    """An encoded image."""

    data: bytes


Element = TextElement | ImageElement


def parse(kind: Kind, members: Mapping[str, bytes]) -> list[Element]:
    """The elements of a sample in order.

    Args:
        kind: what the source holds.
        members: bytes by extension (`txt`, `jpg`, `0.jpg`, `json`).

    Raises:
        BadSample: a member is missing or is not what the kind asks.
    """
    if kind is Kind.pair:
        image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
        if image is None:
            raise BadSample("missing member: no image")
        return [ImageElement(image), TextElement(_text(members, "txt"))]
    if kind is Kind.text:
        return [TextElement(_text(members, "txt"))]
    return _document(members)


def guess_kind(extensions: set[str]) -> Kind | None:
    """The kind of a sample with these members, or None where no kind fits."""
    has_image = any(e.rpartition(".")[2] in IMAGE_EXTENSIONS for e in extensions)
    if "txt" in extensions:
        return Kind.pair if has_image else Kind.text
    return Kind.document if "json" in extensions else None


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, read from the header alone; as stored, before any EXIF rotation.

    Raises:
        BadSample: not an image, larger than `PIXEL_LIMIT`, or of more than `SCAN_LIMIT` scans.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise whatever hostile bytes lead them to (struct.error, KeyError, ...)
        raise BadSample(f"image header unreadable: {error}") from None
    if width * height > PIXEL_LIMIT or max(width, height) > 65535:
        raise BadSample(f"image too large: {width}x{height}")
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > SCAN_LIMIT:
        raise BadSample(f"image too large: {width}x{height} in {scans} scans")
    return width, height


def _document(members: Mapping[str, bytes]) -> list[Element]:
    document = _json(members)
    texts, images = document.get("texts"), document.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSample("json wrong: `texts` and `images` must be lists of one length")
    if len(texts) > ELEMENT_LIMIT:
        raise BadSample(f"document too large: {len(texts)} elements")
    elements: list[Element] = []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise BadSample(f"json wrong: exactly one of texts[{i}] and images[{i}] must be null")
        if isinstance(text, str):
            if not _is_unicode(text):
                raise BadSample(f"text is not Unicode: half a surrogate pair in texts[{i}]")
            if text.strip():
                elements.append(TextElement(text))
        elif isinstance(image, str):
            member = members.get(image.lower())  # extensions are lower case, see `split_name`
            if member is None:
                raise BadSample(f"missing member: {image[:80] or 'an image without a name'}")
            elements.append(ImageElement(member))
        else:
            raise BadSample(f"json wrong: element {i} is neither text nor the name of a member")
    if not any(isinstance(e, TextElement) for e in elements):
        raise BadSample("empty document: no text")
    return elements


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(members: Mapping[str, bytes], extension: str) -> str:
    if extension not in members:
        raise BadSample(f"missing member: {extension}")
    _refuse_large(members[extension])
    try:
        text = members[extension].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"text is not UTF-8: byte {error.start}") from None
    if not text:
        raise BadSample("empty text")
    return text


def _refuse_large(member: bytes) -> None:
    if len(member) > TEXT_LIMIT:
        raise BadSample(f"text too large: {len(member)} bytes")


def _json(members: Mapping[str, bytes]) -> dict[str, Any]:
    if "json" not in members:
        raise BadSample("missing member: json")
    _refuse_large(members["json"])
    try:
        value = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample(f"json unreadable: {error}") from None
    if not isinstance(value, dict):
        raise BadSample("json wrong: not an object")
    return value
