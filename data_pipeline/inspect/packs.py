"""Packs as the model sees them, in plain values that a page or a table can show.

Invariant: what a card shows is read back from the `PackedBatch` (ids, targets, image rows, pixels), never from the sample's own text, so
that what assembly or template got wrong is seen. Only names and original image sizes come from the index.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pyarrow as pa
from PIL import Image

from data_pipeline.batch import PackedBatch, Segment
from data_pipeline.plan.plan import Cursor, Plan
from data_pipeline.plan.split import Pieces
from data_pipeline.read.images import put_together
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.materialise import Materialiser
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """A run of a segment's tokens that are shown alike."""

    kind: str
    """`text`, `special` or `image`."""
    supervised: bool
    text: str
    """Words; the name of a special token; the data URI of an image."""
    tokens: int
    size: str = ""
    """Of an image: its pixels, upright."""
    shown: str = ""
    """Of an image: its pixels as the model sees it."""


@dataclass(frozen=True)
class Card:
    """A piece of a pack with what became of it."""

    source: int
    key: str
    shard: str
    row: int
    epoch: int
    tokens: int
    """As planned; one that is not its sample's last lays out one fewer."""
    images: int
    supervised: int
    note: str
    """What part of its sample the piece is, where it is not the whole."""
    parts: list[Part]
    dropped: str
    """Why it is not in the batch; empty where it is."""

    @property
    def groups(self) -> list[list[Part]]:
        """The parts in order; an image is a group of its own."""
        return [list(group) for _, group in groupby(self.parts, lambda part: part.kind == "image")]


@dataclass(frozen=True)
class PackView:
    """A pack with its cards."""

    at: Cursor
    """Where it lies in the plan."""
    place: str
    """Which rank runs it and when, in words; empty where nobody does."""
    cards: list[Card]
    tokens: int
    images: int
    supervised: int
    length: int
    """T of its micro-batch, padding included."""


def walk(plan: Plan, cursor: Cursor) -> Iterator[tuple[Cursor, Pieces]]:
    """Pack after pack with its place, from `cursor` to the end of the plan."""
    window, first = cursor.window, cursor.pack
    while plan.windows is None or window < plan.windows:
        packs = plan.window(window)
        for i in range(first, len(packs)):
            yield Cursor(window, i), packs.pack(i)
        window, first = window + 1, 0


class Viewer:
    """Turns planned packs into views; remembers the keys of the shards that it met. Without `pictures`, images have no pixels."""

    def __init__(self, materialiser: Materialiser, pictures: bool = True) -> None:
        self._materialiser, self._pictures = materialiser, pictures
        self._keys: dict[tuple[int, int], pa.ChunkedArray] = {}

    def view(self, packs: Sequence[Pieces], at: Sequence[Cursor], place: str = "") -> tuple[PackedBatch, list[PackView]]:
        """The packs of one micro-batch as the batch that the model gets, and as cards; `at` says where each lies in the plan."""
        found = [self._materialiser.segments(pieces) for pieces in packs]
        batch = self._materialiser.assemble([f for outcomes in found for f in outcomes if isinstance(f, Segment)])
        shown = iter(_segment_parts(batch, self._materialiser.tokenizer, self._pictures))
        views = []
        for cursor, pieces, outcomes in zip(at, packs, found, strict=True):
            cards = []
            for i, outcome in enumerate(outcomes):
                parts, dropped = ([], outcome.reason) if isinstance(outcome, BadEntry) else (next(shown), "")
                cards.append(self._card(pieces, i, parts, dropped))
            laid = [part for card in cards for part in card.parts]
            tokens, images = sum(p.tokens for p in laid), sum(p.kind == "image" for p in laid)
            views.append(PackView(cursor, place, cards, tokens, images, sum(c.supervised for c in cards), len(batch.input_ids)))
        return batch, views

    def _card(self, pieces: Pieces, i: int, parts: list[Part], dropped: str) -> Card:
        number, row = int(pieces.source[i]), int(pieces.row[i])
        source = self._materialiser.sources[number]
        shard = source.shard_of(row)
        sizes = iter(_image_sizes(source, pieces, i))
        return Card(
            source=number,
            key=self._shard_keys(number, shard)[row - source.facts.shard_first_rows[shard]].as_py(),
            shard=source.facts.shards[shard],
            row=row,
            epoch=int(pieces.epoch[i]),
            tokens=int(pieces.tokens[i]),
            images=int(pieces.images[i]),
            supervised=sum(part.tokens for part in parts if part.supervised),
            note=_note(pieces, i),
            parts=[replace(part, size=next(sizes)) if part.kind == "image" else part for part in parts],
            dropped=dropped,
        )

    def _shard_keys(self, number: int, shard: int) -> pa.ChunkedArray:
        if (number, shard) not in self._keys:
            self._keys[number, shard] = self._materialiser.sources[number].shard_keys(shard)
        return self._keys[number, shard]


def _image_sizes(source: ShardSource, pieces: Pieces, i: int) -> list[str]:
    """Width x height, upright, of the images of a piece."""
    _, elements = source.elements(pieces.row[i : i + 1])
    own = elements[int(pieces.start_element[i]) : int(pieces.end_element[i]) + 1]
    return [f"{e['width']} x {e['height']}" for e in own if e["width"]]


def _note(pieces: Pieces, i: int) -> str:
    """Says which elements a piece holds, unless it is a whole sample."""
    first, offset = int(pieces.start_element[i]), int(pieces.start_offset[i])
    if first == 0 and offset == 0 and pieces.last[i]:
        return ""
    end, end_offset = int(pieces.end_element[i]), int(pieces.end_offset[i])
    begins = f"element {first}" + (f" from token {offset}" if offset else "")
    ends = f"token {end_offset} of element {end}" if end_offset else f"element {end - 1}"
    return f"a part: {begins} to " + (f"{ends}, the sample's end" if pieces.last[i] else ends)


def _segment_parts(batch: PackedBatch, tokenizer: Tokenizer, pictures: bool) -> list[list[Part]]:
    """What each segment of the batch shows, padding left out."""
    ids = batch.input_ids.tolist()
    predicted = {p + 1 for p in batch.target_index[: batch.supervised].tolist()}
    numbers = [number for number, length in enumerate(batch.image_lengths) for _ in range(length)] if batch.image_count else []
    image_at = dict(zip(batch.image_index.tolist(), numbers, strict=False))
    images = _pictures(batch)
    borders = batch.cu_seqlens.tolist()
    segments = []
    for i in range(len(borders) - 2):
        positions = range(borders[i], borders[i + 1])
        marks = [_mark(p, ids[p], p in predicted, image_at, tokenizer) for p in positions]
        segments.append([_part(run, [ids[p] for p in run], mark, images, tokenizer, pictures) for run, mark in _runs(positions, marks)])
    return segments


Mark = tuple[str, bool, int]
"""(kind, supervised, number): neighbours with one mark are one part. The number keeps images and special tokens apart."""


def _mark(position: int, token: int, supervised: bool, image_at: dict[int, int], tokenizer: Tokenizer) -> Mark:
    if position in image_at:
        return "image", supervised, image_at[position]
    if token in tokenizer.special:
        return "special", supervised, position
    return "text", supervised, 0


def _runs(positions: Sequence[int], marks: Sequence[Mark]) -> Iterator[tuple[list[int], Mark]]:
    run: list[int] = []
    for i, position in enumerate(positions):
        run.append(position)
        if i + 1 == len(positions) or marks[i + 1] != marks[i]:
            yield run, marks[i]
            run = []


def _pictures(batch: PackedBatch) -> list[np.ndarray]:
    """[3, H, W] of each image: its tiles put together, its global view left out."""
    grids = [(rows, columns) for rows, columns in batch.image_grid.tolist()]
    counts = [rows * columns for rows, columns in grids]
    views = (len(batch.images) - sum(counts)) // len(grids)  # 1 where images are partitioned, else 0
    tiles = batch.images.split([views + count for count in counts])
    return [put_together(of_image[views:].numpy(), grid) for of_image, grid in zip(tiles, grids, strict=True)]


def _part(run: Sequence[int], ids: list[int], mark: Mark, images: list[np.ndarray], tokenizer: Tokenizer, pictures: bool) -> Part:
    kind, supervised, number = mark
    if kind == "image":
        _, height, width = images[number].shape
        return Part(kind, supervised, _data_uri(images[number]) if pictures else "", len(run), shown=f"{width} x {height}")
    return Part(kind, supervised, tokenizer.special[ids[0]] if kind == "special" else tokenizer.decode(ids), len(run))


def _data_uri(pixels_3HW: np.ndarray) -> str:
    """The pixels as they are: lossless."""
    out = io.BytesIO()
    Image.fromarray(pixels_3HW.transpose(1, 2, 0)).save(out, "WEBP", lossless=True, method=1)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
