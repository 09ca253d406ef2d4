"""The parts of a batch are the batch: every token, target and image token is in one of them, with the tiles that it comes from."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import IGNORE, L_BUCKET, PADDING_SOURCE, T_BUCKET, PackedBatch, Segment, assemble
from data_pipeline.part import SPARE, part_of
from data_pipeline.plan.partition import token_count
from data_pipeline.text.templates import Rendered

TILE_TOKENS, SIZE = 4, 2
NOWHERE = -1

Elements = Sequence[int | tuple[int, int]]
"""Of a segment, in order: words, or an image as its grid."""

grids = st.tuples(st.integers(1, 3), st.integers(1, 3))
documents = st.lists(st.lists(st.one_of(st.integers(1, 60), grids), min_size=1, max_size=4), max_size=6)


def segment(elements: Elements, number: int, partitioned: bool) -> Segment:
    """Random words, all supervised; every tile is filled with a number of its own."""
    words = np.random.default_rng(number)
    ids, supervised, images, chosen = [1], [False], [], []
    for element in elements:
        is_image = isinstance(element, tuple)
        length = element if not is_image else int(token_count(*element, TILE_TOKENS)) if partitioned else TILE_TOKENS
        images += range(len(ids), len(ids) + length) if is_image else []
        chosen += [element] if is_image else []
        ids += [1] * length if is_image else words.integers(2, 1000, length).tolist()
        supervised += [not is_image] * length
    tiles = sum(r * c + 1 for r, c in chosen) if partitioned else len(chosen)
    pixels = tuple(np.full((3, SIZE, SIZE), (40 * number + i) % 256, np.uint8) for i in range(tiles))
    rendered = Rendered(np.array(ids), np.array(supervised), np.array(images, np.int64), tuple(range(len(chosen))))
    return Segment(rendered, pixels, number % 3, number, tuple(chosen) if partitioned else ())


def placed(batch: PackedBatch, rows: int) -> Tensor:
    """What lands in each row of the batch: the pixel and the place in the tile that it comes from, or a mark; `NOWHERE` for words."""
    features = (batch.images[:, 0, 0, 0].long()[:, None] * 100 + torch.arange(TILE_TOKENS)).flatten()
    features = torch.cat([features, torch.tensor([100_000, 200_000])])
    return torch.full((rows,), NOWHERE).index_copy(0, batch.image_index, features.index_select(0, batch.image_rows))


def targets(batch: PackedBatch, first: int = 0) -> list[tuple[int, int, int]]:
    """Position, token and segment of each target."""
    rows = zip((batch.target_index + first).tolist(), batch.targets.tolist(), batch.target_segment.tolist(), strict=True)
    return [row for row in rows if row[1] != IGNORE]


@settings(max_examples=100)
@given(documents, st.integers(2, 5), st.booleans())
def test_the_parts_together_are_the_batch(packed, ranks, partitioned):
    batch = assemble([segment(elements, i, partitioned) for i, elements in enumerate(packed)], SIZE, TILE_TOKENS, 2)
    parts = [part_of(batch, rank, ranks, TILE_TOKENS) for rank in range(ranks)]
    T, own = len(batch.input_ids), len(parts[0].input_ids) - SPARE
    assert own % T_BUCKET == 0
    assert ranks * own >= T > ranks * (own - T_BUCKET)
    words = placed(batch, ranks * own) == NOWHERE
    whole = torch.cat([part.input_ids[:own] for part in parts])
    assert torch.equal(whole[:T][words[:T]], batch.input_ids[words[:T]])
    landed = [placed(part, own + SPARE) for part in parts]
    assert torch.equal(torch.cat([rows[:own] for rows in landed]), placed(batch, ranks * own))
    assert [row for rank, part in enumerate(parts) for row in targets(part, rank * own)] == targets(batch)
    for part, rows in zip(parts, landed, strict=True):
        assert (part.shared_by, part.supervised, len(part.targets) % L_BUCKET) == (ranks, len(targets(part)), 0)
        assert part.target_index[part.targets == IGNORE].tolist() == [own] * (len(part.targets) - part.supervised)
        assert (part.segment_source[part.target_segment[part.targets == IGNORE]] == PADDING_SOURCE).all()
        assert len(part.images) > 0 and len(part.image_index) > 0, "something to see, on every rank"
        assert (rows[own:] != NOWHERE).any() == (len(part.image_index) == 1 and part.image_count == 0 and part.image_index[0] == own)
        assert part.cu_seqlens[-1] == sum(part.segment_lengths) == len(part.position_ids) == ranks * own
        assert part.position_ids.tolist() == [n for length in part.segment_lengths for n in range(length)]
        assert part.segment_lengths[:-1] == batch.segment_lengths[:-1]
        assert sum(part.image_lengths) == len(part.image_index) and len(part.image_grid) == len(part.image_lengths)


def test_a_tile_that_straddles_a_border_is_in_both_parts_and_no_other_tile_is():
    batch = assemble([segment([13, (1, 1), 4, (1, 1), 9], 0, False)], SIZE, TILE_TOKENS, 2)  # tokens 14-17 and 22-25 of 48
    left, right = (part_of(batch, rank, 3, TILE_TOKENS) for rank in (0, 1))
    assert left.images[:, 0, 0, 0].tolist() == [0] and left.image_rows.tolist() == [0, 1] and left.image_index.tolist() == [14, 15]
    assert right.images[:, 0, 0, 0].tolist() == [0, 1] and right.image_rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert (left.image_count, right.image_count, right.image_lengths) == (1, 2, (2, 4))


def test_the_whole_of_one_rank_is_the_batch_itself():
    batch = assemble([segment([5], 0, False)], SIZE, TILE_TOKENS, 2)
    assert part_of(batch, 0, 1, TILE_TOKENS) is batch
