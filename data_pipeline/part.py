"""One rank's part of a micro-batch whose tokens are shared out over a sequence group (Ulysses, arXiv 2309.14509).

Invariant: every token, every target and every placed image token of the batch is in one rank's part, and each part has the tiles that its
image tokens come from; a tile that straddles a border of parts is in both. So the sums over the parts are those of the batch, without
exchange of features. As in a batch, something always has a place to land: behind its tokens a part has `SPARE` rows, which never leave
the rank.
"""

from collections.abc import Iterable
from dataclasses import replace
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import IGNORE, L_BUCKET, T_BUCKET, PackedBatch

SPARE = T_BUCKET
"""Rows behind the tokens of a part: a dummy image's token and the rows that round L up lie there."""


def part_of(batch: PackedBatch, rank: int, ranks: int, tile_tokens: int) -> PackedBatch:
    """Part `rank` of `ranks`: equally long runs of tokens, the padding segment made longer until it comes out even. Of one rank the batch.

    `tile_tokens` are the image tokens of one tile (`data.images.tokens`). Indices of the part count in its `input_ids`; `position_ids`,
    borders and lengths of segments are those of the whole, since attention sees all tokens.
    """
    if ranks == 1:
        return batch
    T = len(batch.input_ids)
    own = -(-T // (ranks * T_BUCKET)) * T_BUCKET
    first, longer, last = rank * own, ranks * own - T, batch.segment_lengths[-1]
    borders = batch.cu_seqlens.clone()
    borders[-1] += longer
    here_L = _inside(batch.target_index, first, own) & (batch.targets != IGNORE)
    supervised = int(here_L.sum())
    surplus = -(-max(supervised, 1) // L_BUCKET) * L_BUCKET - supervised
    return replace(
        batch,
        input_ids=F.pad(F.pad(batch.input_ids, (0, longer))[first : first + own], (0, SPARE)),
        position_ids=torch.cat([batch.position_ids, torch.arange(last, last + longer)]),
        cu_seqlens=borders,
        segment_lengths=(*batch.segment_lengths[:-1], last + longer),
        target_index=F.pad(batch.target_index[here_L] - first, (0, surplus), value=own),
        targets=F.pad(batch.targets[here_L], (0, surplus), value=IGNORE),
        target_segment=F.pad(batch.target_segment[here_L], (0, surplus), value=len(batch.segment_lengths) - 1),
        supervised=supervised,
        shared_by=ranks,
        **_images(batch, first, own, tile_tokens),
    )


def fingerprint(batches: Iterable[PackedBatch]) -> int:
    """32 bits of what the batches hold: ranks that share them must have the same, or their parts do not fit together."""
    held = [(batch.segment_source.tolist(), batch.segment_sample.tolist(), batch.segment_lengths) for batch in batches]
    return crc32(repr(held).encode())


def _images(batch: PackedBatch, first: int, own: int, tile_tokens: int) -> dict[str, Tensor | tuple[int, ...] | int]:
    """The image tokens inside a part, and a run of tiles that holds those they come from."""
    here_V = _inside(batch.image_index, first, own)
    index_V, rows_V = batch.image_index[here_V] - first, batch.image_rows[here_V]
    owners_V = torch.arange(len(batch.image_lengths)).repeat_interleave(torch.tensor(batch.image_lengths))[here_V]
    owners, lengths = owners_V.unique(return_counts=True)
    count = len(owners) if batch.image_count else 0
    if not len(index_V):  # the dummy: any tile, one token, in the spare rows
        index_V, rows_V, owners, lengths = torch.tensor([own]), torch.tensor([0]), torch.tensor([0]), torch.tensor([1])
    features = len(batch.images) * tile_tokens  # newline and separator have the rows behind these
    tiles = rows_V[rows_V < features] // tile_tokens
    low, high = (int(tiles.min()), int(tiles.max())) if len(tiles) else (0, 0)
    kept = (high + 1 - low) * tile_tokens
    return {
        "images": batch.images[low : high + 1],
        "image_grid": batch.image_grid[owners],
        "image_index": index_V,
        "image_rows": torch.where(rows_V < features, rows_V - low * tile_tokens, rows_V - features + kept),
        "image_count": count,
        "image_lengths": tuple(lengths.tolist()),
    }


def _inside(index: Tensor, first: int, length: int) -> Tensor:
    return (index >= first) & (index < first + length)
