"""Turns planned pieces into segments: reads the bytes, parses, tokenises, decodes.

Invariant: a piece gives the same segment on every worker, rank and life, or is dropped everywhere for the same reason.
"""

import tarfile
from collections.abc import Sequence

import numpy as np

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.config import ImageConfig
from data_pipeline.plan.split import Pieces
from data_pipeline.read.images import Picture, image_tokens, load
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.storage import ShardReader
from data_pipeline.samples import BadSample, Element, ImageElement, parse
from data_pipeline.shards.source import Location, ShardSource
from data_pipeline.shards.tar import read_members
from data_pipeline.text.templates import Bounds, render
from data_pipeline.text.tokenizer import Tokenizer


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

    def batch(
        self, packs: Sequence[Pieces], room: np.ndarray | None = None, at: np.ndarray | None = None
    ) -> tuple[PackedBatch, list[BadEntry]]:
        """The packs of a micro-batch as one batch, and what had to be dropped.

        Args:
            packs: the pieces of each.
            room: [at least their tiles, 3, H, W] uint8, where images are decoded to; memory of their own by default.
            at: [2] int64 that says which (source, row) is in work.
        """
        found: list[Segment | BadEntry] = []
        laid = 0
        for pieces in packs:
            found += self.segments(pieces, at, None if room is None else room[laid:])
            laid = sum(len(s.pixels) for s in found if isinstance(s, Segment))
        return self.assemble([s for s in found if isinstance(s, Segment)], room), [b for b in found if isinstance(b, BadEntry)]

    def segments(self, pieces: Pieces, at: np.ndarray | None = None, room: np.ndarray | None = None) -> list[Segment | BadEntry]:
        """What each piece of a pack gives: its segment, or why it was dropped. `at` and `room` as for `batch`."""
        data = self.reader.read_all([self._locate(pieces, i) for i in range(len(pieces))])
        found = []
        for i in range(len(pieces)):
            if at is not None:
                at[:] = pieces.source[i], pieces.row[i]
            segment = self._segment(pieces, i, data[i], room)
            if room is not None and isinstance(segment, Segment):  # what a dropped one left there is written over
                room = room[len(segment.pixels) :]
            found.append(segment)
        if at is not None:
            at[:] = -1
        return found

    def assemble(self, segments: Sequence[Segment], room: np.ndarray | None = None) -> PackedBatch:
        """The segments as one batch."""
        return assemble(segments, self.images.size, self.images.tokens, self.tokenizer.end, room)

    def elements(self, source: int, row: int) -> list[Element]:
        """The parsed elements of a sample.

        Raises:
            BadSample: its bytes cannot be used.
        """
        return self._parse(source, self.reader.read(self.sources[source].locate(row)))

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

    def _parse(self, source: int, data: bytes) -> list[Element]:
        try:
            members = read_members(data)
        except tarfile.TarError as error:
            raise BadSample(f"unreadable tar: {error}") from None
        return parse(self.sources[source].kind, members)

    def _locate(self, pieces: Pieces, i: int) -> Location:
        return self.sources[int(pieces.source[i])].locate(int(pieces.row[i]))

    def _segment(self, pieces: Pieces, i: int, data: bytes | BadSample, room: np.ndarray | None) -> Segment | BadEntry:
        source, row, epoch = int(pieces.source[i]), int(pieces.row[i]), int(pieces.epoch[i])
        bounds = Bounds(
            int(pieces.start_element[i]),
            int(pieces.start_offset[i]),
            int(pieces.end_element[i]),
            int(pieces.end_offset[i]),
            bool(pieces.last[i]),
        )
        try:
            if (source, row) in self._killers:
                raise BadSample(self._killers[source, row])
            if isinstance(data, BadSample):
                raise data
            elements = self._parse(source, data)
            rendered = render(elements, bounds, self.tokenizer, self._image_tokens)
            counted = int(pieces.tokens[i]) - (0 if bounds.last else 1)
            if len(rendered.ids) != counted:
                raise BadSample(f"sample changed since it was indexed: {len(rendered.ids)} tokens, not {counted}")
            pictures, tiles = [], ()
            for number in rendered.images:
                pictures.append(self._picture(elements, number, source, epoch, row, None if room is None else room[len(tiles) :]))
                tiles += pictures[-1].tiles
        except BadSample as error:
            return self.entry(source, row, str(error))
        return Segment(rendered, tiles, source, row, tuple(grid for picture in pictures for grid in picture.grids))

    def _image_tokens(self, element: ImageElement) -> int:
        return image_tokens(element.data, self.images)

    def _picture(self, elements: list[Element], number: int, source: int, epoch: int, row: int, room: np.ndarray | None = None) -> Picture:
        element = elements[number]
        if not isinstance(element, ImageElement):
            raise BadSample(f"element {number} is not the image that was indexed")
        augmented = self.images.crop or self.images.jitter
        rng = np.random.default_rng([self.seed, source, epoch, row, number]) if augmented else None
        return load(element.data, self.images, rng, room)
