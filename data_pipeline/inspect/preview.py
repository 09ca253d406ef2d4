"""One self-contained page that shows the first packs of a run as the model will see them.

Invariant: everything shown is read back from the `PackedBatch` (ids, targets, image rows, pixels), never from the sample's own text,
so that what assembly or template got wrong is on the page. The page loads nothing and treats all data as text.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
from PIL import Image
from torch import Tensor

from data_pipeline.batch import PackedBatch, Segment
from data_pipeline.config import DataConfig
from data_pipeline.configure import load_data_view
from data_pipeline.errors import UserError
from data_pipeline.loader import Data, open_data
from data_pipeline.plan.plan import Cursor, Plan
from data_pipeline.plan.split import Pieces
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.materialise import Materialiser
from data_pipeline.text.tokenizer import Tokenizer

WIDE_TOKENS = 48
"""A segment with more tokens than this gets a card of the page's full width."""


@dataclass(frozen=True)
class Part:
    """A run of a segment's tokens that are shown alike."""

    kind: str
    """`text`, `special` or `image`."""
    supervised: bool
    text: str
    """Words; the name of a special token; the data URI of an image."""
    tokens: int


@dataclass(frozen=True)
class Card:
    """A piece of a pack with what became of it."""

    source: int
    key: str
    row: int
    epoch: int
    tokens: int
    supervised: int
    note: str
    """What part of its sample the piece is, where it is not the whole."""
    groups: list[list[Part]]
    """Its parts in order; an image is a group of its own."""
    dropped: str
    """Why it is not in the batch; empty where it is."""
    wide: bool


@dataclass(frozen=True)
class PackView:
    """A pack with its cards."""

    window: int
    number: int
    cards: list[Card]
    tokens: int
    images: int
    supervised: int
    length: int
    """T of the batch, padding included."""


def write_preview(config: Path, overrides: list[str], packs: int, output: Path) -> None:
    """Writes the page.

    Raises:
        UserError: the config or the data cannot be used, no pack is asked for, or the page cannot be written.
    """
    if packs < 1:
        raise UserError(f"--packs {packs} shows nothing (ask for at least 1)")
    view = load_data_view(config, overrides)
    data = open_data(view.data, view.run.seed, view.train.steps)
    materialiser = Materialiser(data.sources, data.tokenizer, view.data.images, view.run.seed)
    shown = [_pack_view(materialiser, at, pieces) for at, pieces in _first_packs(data.plan, packs)]
    page = _page(config, view.data, view.run.seed, data, shown)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output.resolve()}: {error.strerror} (choose another file: --output)") from None


def _first_packs(plan: Plan, count: int) -> Iterator[tuple[Cursor, Pieces]]:
    """The first packs of the run and where they lie; fewer where the run ends before."""
    cursor = Cursor(0, 0)
    while count:
        batch = plan.global_batch(cursor)
        if not batch.packs:
            return
        for i, pieces in enumerate(batch.packs[:count]):
            yield Cursor(cursor.window, cursor.pack + i), pieces
        count -= min(count, len(batch.packs))
        cursor = batch.cursor


def _pack_view(materialiser: Materialiser, at: Cursor, pieces: Pieces) -> PackView:
    found = materialiser.segments(pieces)
    batch = materialiser.assemble([f for f in found if isinstance(f, Segment)])
    shown = iter(_segment_parts(batch, materialiser.tokenizer))
    cards = []
    for i, outcome in enumerate(found):
        source, row, tokens = int(pieces.source[i]), int(pieces.row[i]), int(pieces.tokens[i])
        parts = [] if isinstance(outcome, BadEntry) else next(shown)
        cards.append(
            Card(
                source=source,
                key=materialiser.sources[source].key(row),
                row=row,
                epoch=int(pieces.epoch[i]),
                tokens=tokens,
                supervised=sum(p.tokens for p in parts if p.supervised),
                note=_note(pieces, i),
                groups=[list(group) for _, group in groupby(parts, lambda part: part.kind == "image")],
                dropped=outcome.reason if isinstance(outcome, BadEntry) else "",
                wide=tokens > WIDE_TOKENS,
            )
        )
    tokens = sum(batch.segment_lengths[:-1])
    return PackView(at.window, at.pack, cards, tokens, batch.image_count, batch.supervised, len(batch.input_ids))


def _note(pieces: Pieces, i: int) -> str:
    """Says which elements a piece holds, unless it is a whole sample."""
    first, offset = int(pieces.start_element[i]), int(pieces.start_offset[i])
    if first == 0 and offset == 0 and pieces.last[i]:
        return ""
    end, end_offset = int(pieces.end_element[i]), int(pieces.end_offset[i])
    begins = f"element {first}" + (f" from token {offset}" if offset else "")
    ends = f"token {end_offset} of element {end}" if end_offset else f"element {end - 1}"
    return f"a part: {begins} to " + (f"{ends}, the sample's end" if pieces.last[i] else ends)


def _segment_parts(batch: PackedBatch, tokenizer: Tokenizer) -> list[list[Part]]:
    """What each segment of the batch shows, padding left out."""
    ids = batch.input_ids.tolist()
    predicted = {p + 1 for p in batch.target_index[: batch.supervised].tolist()}
    each = len(batch.image_index) // len(batch.images)
    image_rows = batch.image_index.tolist() if batch.image_count else []
    image_at = {position: row // each for row, position in enumerate(image_rows)}
    borders = batch.cu_seqlens.tolist()
    segments = []
    for i in range(len(borders) - 2):
        positions = range(borders[i], borders[i + 1])
        marks = [_mark(p, ids[p], p in predicted, image_at, tokenizer) for p in positions]
        segments.append([_part(run, [ids[p] for p in run], mark, batch.images, tokenizer) for run, mark in _runs(positions, marks)])
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


def _part(run: Sequence[int], ids: list[int], mark: Mark, images: Tensor, tokenizer: Tokenizer) -> Part:
    kind, supervised, number = mark
    if kind == "image":
        return Part(kind, supervised, _data_uri(images[number]), len(run))
    return Part(kind, supervised, tokenizer.special[ids[0]] if kind == "special" else tokenizer.decode(ids), len(run))


def _data_uri(pixels_3HW: Tensor) -> str:
    """The pixels as they are: lossless."""
    out = io.BytesIO()
    Image.fromarray(pixels_3HW.numpy().transpose(1, 2, 0)).save(out, "WEBP", lossless=True, method=1)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def _page(config: Path, section: DataConfig, seed: int, data: Data, packs: list[PackView]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipeline.inspect", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shares = [{"name": source.name, "segments": 0, "tokens": 0} for source in data.sources]
    for card in (card for pack in packs for card in pack.cards):
        shares[card.source]["segments"] += 1
        shares[card.source]["tokens"] += card.tokens
    return environment.get_template("preview.html").render(
        config=config.name,
        section=section,
        seed=seed,
        digest=data.plan.digest,
        shares=shares,
        total=max(1, sum(s["tokens"] for s in shares)),
        packs=packs,
    )
