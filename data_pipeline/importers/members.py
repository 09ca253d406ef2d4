"""The members of a sample, from the values that foreign data hold.

Invariant: what is returned is what `data_pipeline.samples.parse` accepts: it has parsed it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.importers.images import image_member
from data_pipeline.samples import PLACEHOLDER, BadSample, Kind, parse


def pair(images: Sequence[bytes], caption: Any) -> dict[str, bytes]:
    """An image and its caption.

    Raises:
        BadSample: there is not one image, or no text.
    """
    if len(images) != 1:
        raise BadSample(f"not a pair: {len(images)} images for a caption")
    if not isinstance(caption, str):
        raise BadSample("not a pair: no caption")
    extension, data = image_member(images[0])
    return _checked(Kind.pair, {extension: data, "txt": _encode(caption)})


def conversation(record: Mapping[str, Any], images: Sequence[bytes]) -> dict[str, bytes]:
    """Turns and their images in order; what else the record says stays in its JSON.

    Raises:
        BadSample: turns and images do not fit together.
    """
    return _checked(Kind.conversation, {"json": json.dumps(record).encode(), **_numbered(images)})


def place(turns: Sequence[Any]) -> list[Any]:
    """Turns with `<ImageHere>` where LLaVA and its kin write `<image>`."""
    return [{**t, "value": t["value"].replace("<image>", PLACEHOLDER)} if _speaks(t) else t for t in turns]


def _speaks(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def document(parts: Sequence[str | bytes]) -> dict[str, bytes]:
    """Texts (str) and encoded images (bytes) in order.

    Raises:
        BadSample: no text, or an image that is none.
    """
    members = _numbered([part for part in parts if isinstance(part, bytes)])
    names = iter(members)
    value = {
        "texts": [part if isinstance(part, str) else None for part in parts],
        "images": [None if isinstance(part, str) else next(names) for part in parts],
    }
    return _checked(Kind.document, {"json": json.dumps(value).encode(), **members})


def _numbered(images: Sequence[bytes]) -> dict[str, bytes]:
    found = {}
    for i, image in enumerate(images):
        extension, data = image_member(image)
        found[f"{i}.{extension}"] = data
    return found


def _checked(kind: Kind, members: dict[str, bytes]) -> dict[str, bytes]:
    parse(kind, members)
    return members


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadSample("text is not Unicode: half a surrogate pair") from None
