"""Samples into pieces.

Invariant: the pieces of a sample, in order, are exactly its elements; each fits the token and image budgets alone, template
tokens included; an image is never cut, a text only where it is longer than any piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.plan.columns import Budgets, ImagePolicy


@dataclass(frozen=True)
class Pieces:
    """Columns of pieces. A piece runs from (start_element, start_offset) to (end_element, end_offset), exclusive.

    Offsets count tokens of a text element; where end_offset is 0 the element end_element is not part of the piece.
    """

    source: np.ndarray
    """int32"""
    epoch: np.ndarray
    """int64"""
    row: np.ndarray
    """int64: the sample's row in its source"""
    start_element: np.ndarray
    """int32"""
    start_offset: np.ndarray
    """int32"""
    end_element: np.ndarray
    """int32"""
    end_offset: np.ndarray
    """int32"""
    tokens: np.ndarray
    """int32: template tokens included"""
    images: np.ndarray
    """int32: tiles"""
    last: np.ndarray
    """bool: the piece ends its sample"""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: np.ndarray | slice) -> "Pieces":
        """The pieces at `index`."""
        return Pieces(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def none(cls) -> "Pieces":
        """No pieces."""
        empty, place = np.empty(0, np.int64), np.empty(0, np.int32)
        return cls(place, empty, empty, place, place, place, place, place, place, np.empty(0, bool))

    @classmethod
    def concatenate(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """All pieces of `parts`, in order; at least one part."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def split(
    source: int,
    epochs: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    elements: np.ndarray,
    budgets: Budgets,
    policy: ImagePolicy,
    overhead: int,
) -> Pieces:
    """Pieces of the samples `rows` of one source, in order; `counts` [n] says how many of the ELEMENT records each has.

    Greedy, one piece of all unfinished samples at a time. Every piece, whether or not it ends its sample, costs `overhead`
    template tokens. Raises ValueError where an image or a single text token cannot fit.
    """
    room = budgets.tokens - overhead
    if room < 1:
        raise ValueError(f"{overhead} template tokens leave no room in a context of {budgets.tokens}")
    image_tokens, tiles = policy.image_tokens(elements), policy.tiles(elements)
    tokens = elements["tokens"] + image_tokens
    ends = np.cumsum(counts)
    starts = ends - counts
    _refuse_images_too_large(image_tokens, tiles, elements, ends, rows, budgets, room)

    tokens_before = np.concatenate([[0], np.cumsum(tokens)])
    tiles_before = np.concatenate([[0], np.cumsum(tiles)])
    cuttable = np.append((tiles == 0) & (tokens > room), False)

    sample, element, offset = np.arange(len(rows)), starts, np.zeros(len(rows), np.int64)
    rounds = []
    while len(sample):
        begin = tokens_before[element] + offset
        end = ends[sample]
        tile_limit = tiles_before[element] + budgets.images
        short = (tokens_before[end] > begin + room) | (tiles_before[end] > tile_limit)
        end[short] = np.minimum(
            np.searchsorted(tokens_before, begin[short] + room, "right"), np.searchsorted(tiles_before, tile_limit[short], "right")
        )
        end[short] -= 1
        end_offset = np.where(short & cuttable[end], begin + room - tokens_before[end], 0)
        piece_tokens = tokens_before[end] + end_offset - begin + overhead
        piece_tiles = tiles_before[end] - tiles_before[element]
        rounds.append((sample, element, offset, end, end_offset, piece_tokens, piece_tiles, ~short))
        sample, element, offset = sample[short], end[short], end_offset[short]

    columns = [np.concatenate(column) for column in zip(*rounds, strict=True)] if rounds else [np.empty(0, np.int64)] * 8
    if len(rounds) > 1:
        in_order = np.argsort(columns[0], kind="stable")
        columns = [column[in_order] for column in columns]
    sample, element, offset, end, end_offset, piece_tokens, piece_tiles, last = columns
    return Pieces(
        source=np.full(len(sample), source, np.int32),
        epoch=epochs[sample],
        row=rows[sample],
        start_element=(element - starts[sample]).astype(np.int32),
        start_offset=offset.astype(np.int32),
        end_element=(end - starts[sample]).astype(np.int32),
        end_offset=end_offset.astype(np.int32),
        tokens=piece_tokens.astype(np.int32),
        images=piece_tiles.astype(np.int32),
        last=last.astype(bool),
    )


def _refuse_images_too_large(
    image_tokens: np.ndarray,
    tiles: np.ndarray,
    elements: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    budgets: Budgets,
    room: int,
) -> None:
    """Raises ValueError naming the first image that no piece can hold."""
    misfits = np.flatnonzero((image_tokens > room) | (tiles > budgets.images))
    if len(misfits):
        i = int(misfits[0])
        sample = int(np.searchsorted(ends, i, "right"))
        element = i - int(ends[sample - 1] if sample else 0)
        raise ValueError(
            f"row {rows[sample]}, element {element}: an image of {elements['width'][i]} x {elements['height'][i]} pixels takes "
            f"{image_tokens[i]} tokens and {tiles[i]} tiles; a piece has room for {room} tokens and {budgets.images} tiles"
        )
