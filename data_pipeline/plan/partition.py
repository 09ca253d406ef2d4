"""4KHD's dynamic partition (arXiv 2404.06512): an image is a global view and a grid of tiles that its shape chooses.

Invariant: the grid is a function of (width, height, most tiles, side) in integers; tokens, tiles and the order of the tokens follow
from the grid alone. Pure numpy.

The tokens of an image are [global view] [separator] [tiles put together]; a newline ends every row of both.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import numpy as np

from data_pipeline.plan.columns import ImagePolicy, PlanSource

Grid = tuple[int, int]
"""Rows and columns of an image's tiles."""
NEWLINE, SEPARATOR = -1, -2
"""What stands in a `layout` where a learned embedding goes."""
SAMPLED, RUN = 65_536, 1024
"""Samples of a source, in runs, whose sizes stand for all when weights count tokens; of a smaller source all are counted."""


def grids(width: np.ndarray, height: np.ndarray, most: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 rows and columns of images of these sizes, at least one pixel each.

    The long side gets as many tiles of `side` pixels as the limit allows when the short side gets what the aspect then asks for; small
    images are enlarged. Portrait images are landscape ones transposed.
    """
    long, short = np.maximum(width, height).astype(np.int64), np.minimum(width, height).astype(np.int64)
    across = np.ones_like(long)
    for tiles in range(2, most + 1):
        across[tiles * -(-tiles * short // long) <= most] = tiles
    pixels = np.maximum(1, across * side * short // long)
    down = -(-pixels // side)
    landscape = width >= height
    return np.where(landscape, down, across), np.where(landscape, across, down)


def grid_of(width: int, height: int, most: int, side: int) -> Grid:
    """Rows and columns of one image."""
    rows, columns = grids(np.array([width]), np.array([height]), most, side)
    return int(rows[0]), int(columns[0])


def content(width: int, height: int, grid: Grid, side: int) -> tuple[int, int]:
    """Width and height in pixels of the picture inside its grid: the long side fills it, the rest of the short side is padding."""
    rows, columns = grid
    if width >= height:
        return columns * side, max(1, columns * side * height // width)
    return max(1, rows * side * width // height), rows * side


def token_count(rows: np.ndarray | int, columns: np.ndarray | int, tile_tokens: int) -> np.ndarray | int:
    """Tokens of an image: those of its tiles and global view, a newline a row, one separator."""
    line = isqrt(tile_tokens)
    return (rows * columns + 1) * tile_tokens + 1 + (rows + 1) * line


def layout(grid: Grid, tile_tokens: int) -> np.ndarray:
    """int64 by token of an image: which of its features it is, or NEWLINE or SEPARATOR.

    Features are counted tile after tile, the global view first, row-major inside each.
    """
    (rows, columns), line = grid, isqrt(tile_tokens)
    features = np.arange((rows * columns + 1) * tile_tokens)
    whole = features[:tile_tokens].reshape(line, line)
    tiles = features[tile_tokens:].reshape(rows, columns, line, line).swapaxes(1, 2).reshape(rows * line, columns * line)
    return np.concatenate([_with_newlines(whole), [SEPARATOR], _with_newlines(tiles)])


def _with_newlines(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()


@dataclass(frozen=True)
class PartitionPolicy(ImagePolicy):
    """How an image becomes tokens: a global view and up to `most` tiles of `side` pixels, each of `tokens` tokens."""

    side: int
    most: int

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image: all tiles one above the other, so that rows are most."""
        return int(token_count(self.most, 1, self.tokens))

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest image, global view included."""
        return self.most + 1

    def image_tokens(self, elements: np.ndarray) -> np.ndarray:
        """int64 tokens that each element takes as an image; 0 for text."""
        images, rows, columns = self._grids(elements)
        found = np.zeros(len(elements), np.int64)
        found[images] = token_count(rows, columns, self.tokens)
        return found

    def tiles(self, elements: np.ndarray) -> np.ndarray:
        """int64 tiles of each element, global views included; 0 for text."""
        images, rows, columns = self._grids(elements)
        found = np.zeros(len(elements), np.int64)
        found[images] = rows * columns + 1
        return found

    def total_tokens(self, source: PlanSource) -> Fraction:
        """Image tokens of a source; estimated from `SAMPLED` samples spread over it where it has more."""
        kept = int(source.block_starts[-1])
        firsts = range(0, kept, max(RUN, kept * RUN // SAMPLED))
        rows = np.concatenate([np.empty(0, np.int64), *(source.kept(first, min(first + RUN, kept)) for first in firsts)])
        elements = source.elements(rows)[1]
        seen = int((elements["width"] > 0).sum())
        if not seen:
            return Fraction(int(source.images) * self.most_tokens)
        return Fraction(int(source.images) * int(self.image_tokens(elements).sum()), seen)

    def _grids(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which elements are images, and the rows and columns of those."""
        images = np.flatnonzero(elements["width"])
        return images, *grids(elements["width"][images], elements["height"][images], self.most, self.side)
