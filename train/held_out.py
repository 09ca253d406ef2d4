"""A held-out split: what its `candidates.json` asks, and its pictures.

Invariant: a picture is decoded when it is asked for, once; how many tokens it takes is known from the index.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import ImageConfig
from data_pipeline.errors import UserError
from data_pipeline.opened import image_policy
from data_pipeline.read.images import Picture, load
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import BadSample, ImageElement
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.tokenizer import Tokenizer


class HeldOut:
    """One split."""

    def __init__(self, source: ShardSource, tokenizer: Tokenizer, images: ImageConfig) -> None:
        """Reads the items, and no picture.

        Raises:
            UserError: as `read_candidates`.
        """
        self.items, self._rows = read_candidates(source)
        self._source, self._images = source, images
        self._reader = Materialiser([source], tokenizer, images, 0)
        self._decoded: dict[str, Picture] = {}

    def tokens(self) -> dict[str, int]:
        """Tokens of each picture by key."""
        counts, elements = self._source.elements(np.array(list(self._rows.values())))
        parts = np.split(image_policy(self._images).image_tokens(elements), np.cumsum(counts)[:-1])
        return {key: next((int(count) for count in part if count), 0) for key, part in zip(self._rows, parts, strict=True)}

    def picture(self, key: str) -> Picture:
        """The picture of a sample.

        Raises:
            UserError: it cannot be read.
        """
        if key not in self._decoded:
            try:
                image = next(e for e in self._reader.elements(0, self._rows[key]) if isinstance(e, ImageElement))
                self._decoded[key] = load(image.data, self._images, None)
            except BadSample as bad:
                folder = Path(self._source.path).absolute()
                raise UserError(f"{folder}: the picture of {key} cannot be read: {bad} (rebuild the split)") from None
        return self._decoded[key]

    def pictures(self) -> dict[str, Picture]:
        """All pictures that the items name, by key."""
        return {key: self.picture(key) for key in self._rows}


def read_candidates(source: ShardSource) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The items of a split's `candidates.json`, and the row of each picture that they name, by key.

    Raises:
        UserError: it cannot be read, is laid out otherwise, or names a picture that the split does not hold.
    """
    file = Path(source.path) / "candidates.json"
    try:
        items = json.loads(file.read_bytes())["items"]
        whole = items and all(i["candidates"].index(i["caption"]) == i["answer"] for i in items)
        keys = sorted({k for i in items for k in (i["key"], i["wrong_image"])})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        layout = '{"items": [{"key", "caption", "wrong_image", "candidates": [...], "answer": number of the caption}, ...]}'
        raise UserError(f"{file.absolute()} is not laid out as {layout} (rebuild the split)")
    rows = {key: row for row, key in enumerate(source.keys())}
    missing = next((key for key in keys if key not in rows), None)
    if missing is not None:
        raise UserError(f"{file.absolute()} names {missing}, which is not in that folder (rebuild the split)")
    return items, {key: rows[key] for key in keys}
