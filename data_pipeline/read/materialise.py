"""Turns planned pieces into segments: reads the bytes, parses, tokenises, decodes.

Invariant: a piece gives the same segment on every worker, rank and life, or is dropped everywhere for the same reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.config import ImageConfig
from data_pipeline.plan.split import Pieces
from data_pipeline.read.images import Picture, image_tokens, load
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.storage import ShardReader, elements_of
from data_pipeline.samples import BadSample, Element, ImageElement
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.templates import Bounds, Rendered, render
from data_pipeline.text.tokenizer import Tokenizer

Made = tuple[PackedBatch, list[BadEntry]]
"""A micro-batch and what had to be dropped from it."""


class _Place(NamedTuple):
    """Where a piece comes from: a row of `Pieces` in Python's own numbers."""

    source: int
    epoch: int
    row: int
    start_element: int
    start_offset: int
    end_element: int
    end_offset: int
    tokens: int
    last: bool


@dataclass(frozen=True)
class _Read:
    """A piece whose pictures are not decoded yet."""

    place: _Place
    elements: list[Element]
    rendered: Rendered


class Materialiser:
    """Reads pieces of a fixed list of sources, but drops the samples of `killers`; one a worker."""

    def __init__(
        self,
        sources: Sequence[ShardSource],
        tokenizer: Tokenizer,
        images: ImageConfig,
        seed: int,
        reader: ShardReader | None = None,
        killers: Sequence[BadEntry] = (),
    ) -> None:
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self.images = images
        self.seed = seed
        self.reader = reader or ShardReader()
        self._killers = self._rows(killers)

    def batch(self, packs: Sequence[Pieces]) -> Made:
        """The packs of a micro-batch as one batch, and what had to be dropped."""
        return self.batches([packs], [None])[0]

    def batches(self, requests: Sequence[Sequence[Pieces]], rooms: Sequence[np.ndarray | None], at: np.ndarray | None = None) -> list[Made]:
        """The packs of several micro-batches.

        Words first, then all pictures, then what is made of both: a picture fills a processor's cache, and words handled between two of
        them cost twice as much.

        Args:
            requests: the packs of each micro-batch, and of each the pieces.
            rooms: [at least its tiles, 3, H, W] uint8 of each, where images are decoded to; None: memory of their own.
            at: [2] int64 that says which (source, row) is in work.
        """
        read = [[self._read_all(pieces, at) for pieces in packs] for packs in requests]
        decoded = [self._decode_all(list(chain(*parts)), room, at) for parts, room in zip(read, rooms, strict=True)]
        if at is not None:
            at[:] = -1
        return [
            (self.assemble([s for s in found if isinstance(s, Segment)], room), [b for b in found if isinstance(b, BadEntry)])
            for found, room in zip(decoded, rooms, strict=True)
        ]

    def segments(self, pieces: Pieces) -> list[Segment | BadEntry]:
        """What each piece of a pack gives: its segment, or why it was dropped."""
        return self._decode_all(self._read_all(pieces, None), None, None)

    def assemble(self, segments: Sequence[Segment], room: np.ndarray | None = None) -> PackedBatch:
        """The segments as one batch."""
        return assemble(segments, self.images.size, self.images.tokens, self.tokenizer.end, room)

    def elements(self, source: int, row: int) -> list[Element]:
        """The parsed elements of a sample.

        Raises:
            BadSample: its bytes cannot be used.
        """
        return elements_of(self.sources[source].kind, self.reader.read(self.sources[source].locate(row)))

    def entry(self, source: int, row: int, reason: str) -> BadEntry:
        """A sample as the ledger names it."""
        at = self.sources[source].locate(row)
        return BadEntry(self.sources[source].name, at.shard.name, self.sources[source].key(row), at.offset, at.size, reason)

    def _rows(self, entries: Sequence[BadEntry]) -> dict[tuple[int, int], str]:
        """(source, row) of ledger entries, with their reasons."""
        numbers = {source.name: number for number, source in enumerate(self.sources)}
        named = [(numbers[entry.source], entry) for entry in entries if entry.source in numbers]
        rows = {(number, self.sources[number].row_at(entry.shard, entry.offset)): entry.reason for number, entry in named}
        return {(number, row): reason for (number, row), reason in rows.items() if row is not None}

    def _read_all(self, pieces: Pieces, at: np.ndarray | None) -> list[_Read | BadEntry]:
        if at is not None:  # a worker that is killed while it waits for the store was killed by no sample
            at[:] = -1
        columns = (getattr(pieces, name).tolist() for name in _Place._fields)
        places = [_Place(*row) for row in zip(*columns, strict=True)]
        data = self.reader.read_all([self.sources[place.source].locate(place.row) for place in places])
        return [self._kept(self._read, place, at, found) for place, found in zip(places, data, strict=True)]

    def _decode_all(self, read: Sequence[_Read | BadEntry], room: np.ndarray | None, at: np.ndarray | None) -> list[Segment | BadEntry]:
        found: list[Segment | BadEntry] = []
        for piece in read:
            segment = self._kept(self._decoded, piece.place, at, piece, room) if isinstance(piece, _Read) else piece
            if room is not None and isinstance(segment, Segment):  # what a dropped one left there is written over
                room = room[len(segment.pixels) :]
            found.append(segment)
        return found

    def _kept(self, work: Callable[..., Any], place: _Place, at: np.ndarray | None, *arguments: Any) -> Any:
        """What `work` makes of a piece, or why it was dropped; `at` says meanwhile which sample is in work."""
        if at is not None:
            at[:] = place.source, place.row
        try:
            return work(place, *arguments)
        except BadSample as error:
            return self.entry(place.source, place.row, str(error))

    def _read(self, place: _Place, data: bytes | BadSample) -> _Read:
        if (place.source, place.row) in self._killers:
            raise BadSample(self._killers[place.source, place.row])
        if isinstance(data, BadSample):
            raise data
        elements = elements_of(self.sources[place.source].kind, data)
        bounds = Bounds(place.start_element, place.start_offset, place.end_element, place.end_offset, place.last)
        rendered = render(elements, bounds, self.tokenizer, self._image_tokens)
        counted = place.tokens - (0 if place.last else 1)
        if len(rendered.ids) != counted:
            raise BadSample(f"sample changed since it was indexed: {len(rendered.ids)} tokens, not {counted}")
        return _Read(place, elements, rendered)

    def _decoded(self, place: _Place, read: _Read, room: np.ndarray | None) -> Segment:
        pictures, tiles = [], ()
        for number in read.rendered.images:
            left = None if room is None else room[len(tiles) :]
            pictures.append(self._picture(read.elements, number, place.source, place.epoch, place.row, left))
            tiles += pictures[-1].tiles
        return Segment(read.rendered, tiles, place.source, place.row, tuple(grid for picture in pictures for grid in picture.grids))

    def _image_tokens(self, element: ImageElement) -> int:
        return image_tokens(element.data, self.images)

    def _picture(self, elements: list[Element], number: int, source: int, epoch: int, row: int, room: np.ndarray | None = None) -> Picture:
        element = elements[number]
        if not isinstance(element, ImageElement):
            raise BadSample(f"element {number} is not the image that was indexed")
        augmented = self.images.crop or self.images.jitter
        rng = np.random.default_rng([self.seed % 2**64, source, epoch, row, number]) if augmented else None
        return load(element.data, self.images, rng, room)
