"""The only place that knows what a sample looks like: raw members of a tar become an ordered list of texts and images.

Invariant: the indexer and the reader call the same `parse`, so what was counted is what is trained on.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
PLACEHOLDER = "<ImageHere>"
"""Where an image of a conversation stands in its text: plain words in the data, never a token."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, whatever a member calls itself: no format whose decoder starts a program (EPS), none that nobody publishes."""
PIXEL_LIMIT = 178_000_000
"""Largest image, in pixels, that is decoded: about Pillow's own limit against decompression bombs."""
Image.MAX_IMAGE_PIXELS = None  # `require_size` stands before every decode, and names the size that it refuses
SCAN_LIMIT = 100
"""Most scans of a JPEG, each of which goes over the whole picture for a few bytes; progressive ones that are meant well have ten or so."""
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""What begins a segment of a JPEG, or ends it: not stuffed zeros, restarts, and what a decoder drops behind a restart."""
LYING = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
TEXT_LIMIT = 1 << 22
"""Largest text or JSON member in bytes: a long novel; as tokens or as objects it takes hundreds of times the memory."""
ELEMENT_LIMIT = 10_000
"""Most elements of a document, or turns of a conversation, by the same reasoning."""


class Kind(Enum):
    """What the samples of a source are."""

    pair = "pair"  # K.jpg|jpeg|png|webp + K.txt (+ K.json), as img2dataset writes it
    document = "document"  # K.json with parallel lists `texts` and `images` (OBELICS) + K.0.jpg, ...
    conversation = "conversation"  # K.json with `conversations` (`from`, `value` with <ImageHere>) + K.0.jpg, ...
    text = "text"  # K.txt


class BadSample(Exception):  # noqa: N818  a fact about data, not a fault of the program
    """The sample cannot be used, now or on any later read; the message says why."""


class Role(Enum):
    """Whose turn it is in a conversation."""

    user = "user"
    assistant = "assistant"


ROLES = {"user": Role.user, "human": Role.user, "assistant": Role.assistant, "gpt": Role.assistant, "bot": Role.assistant}
"""By what the data call them, in lower case; `bot` stands in the official fine-tuning examples."""


@dataclass(frozen=True)
class TextElement:
    """A run of words."""

    text: str
    supervised: bool = True
    """Words to learn; those of a user are only read."""


@dataclass(frozen=True)
class ImageElement:
    """An encoded image."""

    data: bytes


@dataclass(frozen=True)
class TurnElement:
    """A border between turns of a conversation, never supervised; which tokens it has is the template's affair."""

    before: Role | None
    """Whose turn ends; None before the first."""
    after: Role | None
    """Whose turn begins; None after the last."""


@dataclass(frozen=True)
class AnswerEndElement:
    """The end of an assistant's turn, supervised as its words are: the model learns to stop."""

    last: bool
    """Nothing follows but the end of the sample."""


MarkerElement = TurnElement | AnswerEndElement
"""What stands between the words of a conversation; counts tokens as a text does."""
Element = TextElement | ImageElement | MarkerElement


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
    return _conversation(members) if kind is Kind.conversation else _document(members)


def guess_kind(members: Mapping[str, bytes]) -> Kind | None:
    """The kind of a sample with these members, or None where no kind fits."""
    has_image = any(_is_image(e) for e in members)
    if "txt" in members:
        return Kind.pair if has_image else Kind.text
    if "json" not in members:
        return None
    try:
        return Kind.conversation if "conversations" in _json(members) else Kind.document
    except BadSample:
        return Kind.document


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as a person sees the image (EXIF orientation applied), read from the header alone.

    Raises:
        BadSample: not an image, larger than `PIXEL_LIMIT`, or of more than `SCAN_LIMIT` scans.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = upright_size(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its own words name a buffer's address, another one each time
        raise BadSample("image header unreadable: of no format that is read") from None
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise whatever hostile bytes lead them to (struct.error, KeyError, ...)
        raise BadSample(f"image header unreadable: {error}") from None
    require_size(width, height)
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > SCAN_LIMIT and (scans := _scans(data)) > SCAN_LIMIT:
        raise BadSample(f"image too large: {width}x{height} in {scans} scans")
    return width, height


def _scans(data: bytes) -> int:
    """Scans of a JPEG up to its end: behind it a phone may have put a film, in which the bytes of a marker stand by chance."""
    at, scans = 2, 0
    while (marker := _MARKER.search(data, at)) and marker[0] != _END:
        scans += marker[0] == _SCAN
        at = marker.end()
        at += int.from_bytes(data[at : at + 2])  # its length, which counts itself
    return scans


def orientation(image: Image.Image) -> int | None:
    """EXIF orientation of an opened image, by what stands before its pixels; None where it has none."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own would decode the picture to look behind it
    except Exception:  # noqa: BLE001  an EXIF block that cannot be read orients nothing; the pixels are sound
        return None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned upright."""
    lying = image.format != "TIFF" and orientation(image) in LYING  # Pillow turns TIFF itself
    return (image.height, image.width) if lying else image.size


def require_size(width: int, height: int) -> None:
    """Refuses an image that would take too much memory, or whose sides the index cannot hold.

    Raises:
        BadSample: it is too large.
    """
    if width * height > PIXEL_LIMIT or max(width, height) > 65535:
        raise BadSample(f"image too large: {width}x{height}")


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
            if not is_unicode(text):
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


def _conversation(members: Mapping[str, bytes]) -> list[Element]:
    turns = _json(members).get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("json wrong: `conversations` must be a list of turns")
    if len(turns) > ELEMENT_LIMIT:
        raise BadSample(f"conversation too large: {len(turns)} turns")
    images = _numbered_images(members)
    spoken = [_turn(i, turn) for i, turn in enumerate(turns)]
    placeholders = sum(value.count(PLACEHOLDER) for _, value in spoken)
    unplaced = placeholders == 0 and len(images) == 1  # the official code puts a single image first where no placeholder says otherwise
    if placeholders != len(images) and not unplaced:
        raise BadSample(f"json wrong: {placeholders} {PLACEHOLDER} for {len(images)} images")
    if not any(role is Role.assistant and value.replace(PLACEHOLDER, "").strip() for role, value in spoken):
        raise BadSample("empty conversation: no answer")
    elements: list[Element] = [ImageElement(images[0])] if unplaced else []
    rest, before = iter(images), None
    for number, (role, value) in enumerate(spoken, 1):
        elements.append(TurnElement(before, role))
        for i, text in enumerate(value.split(PLACEHOLDER)):
            if i:
                elements.append(ImageElement(next(rest)))
            if text:
                elements.append(TextElement(text, supervised=role is Role.assistant))
        if role is Role.assistant:
            elements.append(AnswerEndElement(last=number == len(spoken)))
        before = role
    return [*elements, TurnElement(before, None)] if before is Role.user else elements


def _turn(number: int, turn: Any) -> tuple[Role, str]:
    """Who speaks and what, as it stands between the markers."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise BadSample(f"json wrong: conversations[{number}] needs the texts `from` and `value`")
    role = ROLES.get(turn["from"].lower())
    if role is None:
        raise BadSample(f"json wrong: conversations[{number}] is from {turn['from'][:40]!r}, not one of {', '.join(ROLES)}")
    if not is_unicode(turn["value"]):
        raise BadSample(f"text is not Unicode: half a surrogate pair in conversations[{number}]")
    return role, turn["value"].strip()


def _numbered_images(members: Mapping[str, bytes]) -> list[bytes]:
    """The images `0.jpg`, `1.png`, ... in the order of their numbers, none missing; one that stands alone needs no number."""
    named = [e for e in members if _is_image(e)]
    if len(named) == 1 and "." not in named[0]:
        return [members[named[0]]]
    by_number = {e.rpartition(".")[0]: members[e] for e in named}
    missing = [str(i) for i in range(len(named)) if str(i) not in by_number]
    if missing:
        raise BadSample(f"missing member: image {missing[0]} of {len(named)}")
    return [by_number[str(i)] for i in range(len(named))]


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def is_unicode(text: str) -> bool:
    """False where a text has half a surrogate pair, which no tokenizer takes."""
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
