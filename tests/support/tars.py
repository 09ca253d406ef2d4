"""Small tars, whole or broken, and the damage that storage does to them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A plain tar of these members, in order; names may repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_image(width: int = 8, height: int = 6, colour: str | tuple[int, int, int] = "red", form: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, form)
    return out.getvalue()


def make_pairs(count: int) -> list[tuple[str, bytes]]:
    """Members of `count` good pairs; sizes and captions differ."""
    return [m for i in range(count) for m in ((f"k{i}.png", make_image(8 + i, 6)), (f"k{i}.txt", f"red apple {i}".encode()))]


def make_document(key: str, parts: Sequence[str | bytes]) -> list[tuple[str, bytes]]:
    """Members of an interleaved document: its texts (str) and encoded pictures (bytes) in order."""
    names = [None if isinstance(p, str) else f"{i}.png" for i, p in enumerate(parts)]
    value = {"texts": [p if isinstance(p, str) else None for p in parts], "images": names}
    pictures = [(f"{key}.{i}.png", p) for i, p in enumerate(parts) if isinstance(p, bytes)]
    return [(f"{key}.json", json.dumps(value).encode()), *pictures]


def make_conversation(key: str, turns: Sequence[tuple[str, str]], images: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """Members of a conversation: who says what, with <ImageHere> where an image stands, and its encoded pictures."""
    value = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    return [(f"{key}.json", json.dumps(value).encode()), *((f"{key}.{i}.png", image) for i, image in enumerate(images))]


def member_offsets(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the header, end of the data without padding) of each member."""
    with tarfile.open(path) as tar:
        return [(m.name, m.offset, m.offset_data + m.size) for m in tar]


def cut(path: Path, size: int) -> Path:
    """Truncates a file."""
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def insert(path: Path, offset: int, data: bytes) -> Path:
    """Puts bytes between the others."""
    content = path.read_bytes()
    path.write_bytes(content[:offset] + data + content[offset:])
    return path


def overwrite(path: Path, offset: int, data: bytes) -> Path:
    """Replaces bytes, the size stays."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path
