"""PackedBatch: the one contract between data and model, and its assembly from decoded segments.

Invariant: every pack ends in a padding segment; a batch without images carries one dummy image whose features land in that
segment. So the ViT, the projector and PLoRA always see at least one row, and nobody branches on "has images".
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.plan.partition import NEWLINE, Grid, layout
from data_pipeline.text.templates import Rendered

IGNORE = -100
"""Target of a row that only rounds L up."""
PADDING_SOURCE = -1
"""Source and sample of the padding segment."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: packs laid end to end. T tokens, S segments (the last is padding), M tiles, V image tokens, L targets.

    T and L are rounded up to buckets, so that shapes repeat. An image is one tile, or of policy `partition` several.
    """

    input_ids: Tensor
    """[T] int64; image positions hold any valid id, their embedding is replaced."""
    position_ids: Tensor
    """[T] int64; restart at 0 in every segment."""
    cu_seqlens: Tensor
    """[S+1] int32; segment borders, cu_seqlens[-1] == T."""
    images: Tensor
    """[M, 3, H, W] uint8, in memory channels last; normalised on the device. Of a partitioned image first the global view, then its tiles,
    row by row."""
    image_grid: Tensor
    """[images, 2] int64; tiles of each image, rows then columns, its global view not counted."""
    image_index: Tensor
    """[V] int64; packed positions of the image tokens, in order; those of a dummy image point into the padding segment."""
    image_rows: Tensor
    """[V] int64; what is placed there: a row of the projected features of all tiles, the newline behind the last of them, or the
    separator behind that. Of squares each row in its turn."""
    target_index: Tensor
    """[L] int64; positions whose next token is supervised."""
    targets: Tensor
    """[L] int64; the tokens to predict, `IGNORE` where L was rounded up."""
    target_segment: Tensor
    """[L] int64; the segment of each target, so that losses by source and by sample need no search."""
    segment_source: Tensor
    """[S] int32; source of each segment, `PADDING_SOURCE` for padding."""
    segment_sample: Tensor
    """[S] int64; row of each segment's sample in its source, `PADDING_SOURCE` for padding."""
    segment_lengths: tuple[int, ...]
    """The lengths of the S segments as Python ints: attention and FLOPs need no device read."""
    supervised: int
    """Targets that are not `IGNORE`."""
    image_count: int
    """Images that are not the dummy."""
    image_lengths: tuple[int, ...]
    """Tokens of each image, the dummy's too, as Python ints."""
    shared_by: int = 1
    """Ranks that hold a part of these tokens each; above 1 this is one of the parts (data_pipeline/part.py)."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked memory."""
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors().items()})


@dataclass(frozen=True)
class Segment:
    """A rendered piece with its pixels, ready to be packed."""

    rendered: Rendered
    pixels: tuple[np.ndarray, ...]
    """One [3, H, W] uint8 a tile, image after image."""
    source: int
    sample: int
    grids: tuple[Grid, ...] = ()
    """Of partitioned images, rows and columns of each; none where an image is one tile."""


T_BUCKET = 16
"""T is a multiple of this, at least one padding token included."""
L_BUCKET = 64
"""L is a multiple of this: ever-changing row counts made memory grow on CPUs."""


def assemble(segments: Sequence[Segment], image_size: int, image_tokens: int, pad_id: int, room: np.ndarray | None = None) -> PackedBatch:
    """Lays segments end to end and closes with the padding segment; no segment at all gives an empty pack.

    `image_size` and `image_tokens` are those of one tile. `room` [at least M, 3, H, W] uint8 is where the segments' tiles lie already, one
    behind the other; by default they are copied together.
    """
    rendered = [s.rendered for s in segments]
    lengths = [len(r.ids) for r in rendered]
    total = sum(lengths)
    T = _round_up(total + 1, T_BUCKET)
    lengths.append(T - total)
    starts = np.cumsum([0, *lengths])
    padding_at = T - 1

    ids = np.concatenate([*(r.ids for r in rendered), np.full(T - total, pad_id, np.int64)])
    positions = np.arange(T) - np.repeat(starts[:-1], lengths)

    words = np.flatnonzero(np.concatenate([*(r.supervised for r in rendered), np.zeros(1, bool)]))  # never the first of a segment
    supervised = len(words)
    L = _round_up(max(supervised, 1), L_BUCKET)
    targets = np.full(L, IGNORE, np.int64)
    targets[:supervised] = ids[words]
    owner = np.searchsorted(starts, words, "right") - 1

    pixels = [p for s in segments for p in s.pixels]
    image_index = _concatenate([r.image_positions + starts[i] for i, r in enumerate(rendered)])
    image_rows, image_lengths = _image_rows(segments, image_tokens)
    grids = [grid for s in segments for grid in s.grids or [(1, 1)] * len(s.pixels)]
    image_count = len(image_lengths)
    if not pixels:
        pixels = [np.zeros((3, image_size, image_size), np.uint8) if room is None else room[0]]
        pixels[0][:] = 0
        image_index, image_rows = np.full(image_tokens, padding_at), np.arange(image_tokens)
        image_lengths, grids = [image_tokens], [(1, 1)]
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        images=torch.from_numpy(_stack(pixels) if room is None else room[: len(pixels)]),
        image_grid=torch.from_numpy(np.array(grids, np.int64)),
        image_index=torch.from_numpy(image_index),
        image_rows=torch.from_numpy(image_rows),
        target_index=torch.from_numpy(_fill(words - 1, L, padding_at)),
        targets=torch.from_numpy(targets),
        target_segment=torch.from_numpy(_fill(owner, L, len(segments))),
        segment_source=torch.from_numpy(np.array([*(s.source for s in segments), PADDING_SOURCE], np.int32)),
        segment_sample=torch.from_numpy(np.array([*(s.sample for s in segments), PADDING_SOURCE], np.int64)),
        segment_lengths=tuple(lengths),
        supervised=supervised,
        image_count=image_count,
        image_lengths=tuple(image_lengths),
    )


def _image_rows(segments: Sequence[Segment], tile_tokens: int) -> tuple[np.ndarray, list[int]]:
    """int64 row that goes to each image token, newline and separator behind the rows of all tiles; and the tokens of each image."""
    squares = sum(len(s.pixels) for s in segments)
    if not any(s.grids for s in segments):
        return np.arange(squares * tile_tokens), [tile_tokens] * squares
    rows, used, total = [], 0, squares * tile_tokens
    for segment in segments:
        for of_image in [layout(grid, tile_tokens) for grid in segment.grids] or [np.arange(tile_tokens)] * len(segment.pixels):
            features = of_image >= 0
            rows.append(np.where(features, used + of_image, total + NEWLINE - of_image))
            used += int(features.sum())
    return _concatenate(rows), [len(of_image) for of_image in rows]


def _stack(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """[M, 3, H, W], channels last in memory, as tiles are decoded."""
    return np.moveaxis(np.stack([np.moveaxis(tile, 0, -1) for tile in tiles]), -1, 1)


def _round_up(value: int, bucket: int) -> int:
    return -(-value // bucket) * bucket


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, np.int64)


def _fill(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), value, np.int64)])
