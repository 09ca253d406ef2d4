"""What the plan needs to know of a source, of images and of packs, in plain columns.

Invariant: nothing here reads a file; a `PlanSource` is immutable, so that the same rows always have the same elements.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

ELEMENT = np.dtype([("tokens", "<i4"), ("width", "<u2"), ("height", "<u2")])
"""One element of a sample. Text: tokens >= 0 and width == 0. Image: tokens == 0, width and height in pixels."""


class PlanSource(Protocol):
    """A source as the plan sees it: kept samples numbered by ordinal, in physical order, and their elements."""

    name: str
    block_starts: np.ndarray
    """int64 [B+1]: the kept ordinal at which each physical block begins (blocks may hold none); the last is the kept total."""
    text_tokens: int
    """Text tokens of all kept samples."""
    images: int
    """Images of all kept samples."""
    digest: str
    """Covers rows, selection, tokenizer and whatever else the columns depend on."""

    def kept(self, first: int, last: int) -> np.ndarray:
        """int64 rows of the kept ordinals [first, last), ascending."""
        ...

    def kept_runs(self, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """As `kept`, of many runs [first, end) of ordinals (int64), joined: a sparse selection has thousands in a window."""
        ...

    def elements(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Elements of `rows`, which come in any order and may repeat: counts int64 [n], and ELEMENT records in that order."""
        ...


@dataclass(frozen=True)
class ImagePolicy:
    """How an image becomes tokens: resized to one square tile, whatever its size."""

    tokens: int
    """Tokens of one tile."""

    @property
    def most_tokens(self) -> int:
        """Tokens of the image that takes most."""
        return self.tokens

    @property
    def most_tiles(self) -> int:
        """Tiles of the image that takes most."""
        return 1

    def image_tokens(self, elements: np.ndarray) -> np.ndarray:
        """int64 tokens that each element takes as an image; 0 for text."""
        return self.tiles(elements) * self.tokens

    def tiles(self, elements: np.ndarray) -> np.ndarray:
        """int64 tiles of each element, which is what the image budget counts; 0 for text."""
        return (elements["width"] > 0).astype(np.int64)

    def total_tokens(self, source: PlanSource) -> Fraction:
        """Image tokens of all kept samples of a source."""
        return Fraction(int(source.images) * self.tokens)


@dataclass(frozen=True)
class Budgets:
    """What one pack may hold."""

    tokens: int
    """Tokens, template tokens included; also the longest piece."""
    images: int
    """Image tiles."""
    segments: int
    """Pieces."""
