"""The packed batch keeps its contract whatever segments it is built from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import IGNORE, L_BUCKET, PADDING_SOURCE, T_BUCKET, PackedBatch, Segment, assemble
from data_pipeline.samples import ImageElement, TextElement
from data_pipeline.text.templates import Bounds, render, whole

BEGIN, END, IMAGE_TOKENS, SIZE = 1, 2, 3, 4
IMAGE = None


class Letters:
    """A tokenizer whose tokens are the code points of letters."""

    begin, end = BEGIN, END

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


words = st.text("abcdef", min_size=0, max_size=40)
samples = st.lists(st.one_of(words, st.just(IMAGE)), min_size=1, max_size=5).filter(lambda parts: any(p is not IMAGE for p in parts))
packs = st.lists(samples, max_size=12)


def segment(parts: list[str | None], number: int, bounds: Bounds | None = None) -> Segment:
    """The rendered sample; image i of a batch is filled with its own number."""
    elements = [ImageElement(b"") if p is IMAGE else TextElement(p) for p in parts]
    rendered = render(elements, bounds or whole(elements), Letters(), IMAGE_TOKENS)
    pixels = tuple(np.full((3, SIZE, SIZE), (7 * number + i) % 256, np.uint8) for i in rendered.images)
    return Segment(rendered, pixels, source=number % 3, sample=100 + number)


def batch_of(parts: list[list[str | None]]) -> PackedBatch:
    return assemble([segment(p, i) for i, p in enumerate(parts)], SIZE, IMAGE_TOKENS, END)


@settings(max_examples=150)
@given(packs)
def test_segments_lie_end_to_end_and_padding_closes_them(parts):
    batch = batch_of(parts)
    T, borders = len(batch.input_ids), batch.cu_seqlens.tolist()
    assert T % T_BUCKET == 0
    assert borders[0] == 0
    assert borders[-1] == T
    assert np.diff(borders).tolist() == list(batch.segment_lengths)
    assert len(borders) == len(parts) + 2
    assert 1 <= batch.segment_lengths[-1] <= T_BUCKET
    expected = [n for length in batch.segment_lengths for n in range(length)]
    assert batch.position_ids.tolist() == expected
    assert batch.segment_source.tolist() == [*(i % 3 for i in range(len(parts))), PADDING_SOURCE]
    assert batch.segment_sample.tolist() == [*(100 + i for i in range(len(parts))), PADDING_SOURCE]


@settings(max_examples=150)
@given(packs)
def test_targets_are_the_next_tokens_of_the_same_segment(parts):
    batch = batch_of(parts)
    ids, borders, images = batch.input_ids.tolist(), batch.cu_seqlens.tolist(), set(batch.image_index.tolist())
    assert len(batch.target_index) % L_BUCKET == 0
    assert len(batch.target_index) >= L_BUCKET
    assert batch.supervised == sum(t != IGNORE for t in batch.targets.tolist())
    rows = list(zip(batch.target_index.tolist(), batch.targets.tolist(), batch.target_segment.tolist(), strict=True))
    for at, token, owner in rows[: batch.supervised]:
        assert borders[owner] <= at
        assert at + 1 < borders[owner + 1], "a target must not cross a border"
        assert token == ids[at + 1]
        assert at + 1 not in images, "an image position is never a target"
    for at, token, owner in rows[batch.supervised :]:
        assert (token, owner) == (IGNORE, len(parts))
        assert borders[-2] <= at < borders[-1], "surplus rows lie in the padding"


@settings(max_examples=150)
@given(packs)
def test_targets_read_as_the_text_of_each_sample(parts):
    batch = batch_of(parts)
    read: list[list[int]] = [[] for _ in parts]
    for token, owner in zip(batch.targets.tolist(), batch.target_segment.tolist(), strict=True):
        if token != IGNORE:
            read[owner].append(token)
    for tokens, sample in zip(read, parts, strict=True):
        assert tokens[-1] == END
        assert Letters().decode(tokens[:-1]) == "".join(p for p in sample if p is not IMAGE)


@settings(max_examples=150)
@given(packs)
def test_every_image_has_its_rows_in_its_own_segment(parts):
    batch = batch_of(parts)
    real = [(number, i) for number, sample in enumerate(parts) for i, p in enumerate(sample) if p is IMAGE]
    borders = batch.cu_seqlens.tolist()
    rows = batch.image_index.reshape(-1, IMAGE_TOKENS).tolist()
    assert batch.image_count == len(real)
    assert len(rows) == len(batch.images) == len(batch.image_grid) == max(1, len(real)), "a dummy stands in for no image at all"
    if real:
        assert batch.image_index.unique().numel() == batch.image_index.numel()
        for (number, i), row, pixels in zip(real, rows, batch.images, strict=True):
            first = borders[number] + 1 + sum(IMAGE_TOKENS if p is IMAGE else len(p) for p in parts[number][:i])
            assert row == list(range(first, first + IMAGE_TOKENS))
            assert pixels.unique().tolist() == [(7 * number + i) % 256]
    else:
        assert all(borders[-2] <= at < borders[-1] for row in rows for at in row), "the dummy's features land in the padding"


@given(packs)
@settings(max_examples=50)
def test_image_rows_hold_valid_ids(parts):
    batch = batch_of(parts)
    assert set(batch.input_ids[batch.image_index].tolist()) == {END}


def test_an_empty_pack_has_every_row_that_a_model_needs():
    batch = batch_of([])
    assert batch.segment_lengths == (T_BUCKET,)
    assert batch.supervised == 0
    assert set(batch.targets.tolist()) == {IGNORE}
    assert batch.images.shape == (1, 3, SIZE, SIZE)
    assert batch.image_index.tolist() == [T_BUCKET - 1] * IMAGE_TOKENS


def test_moving_a_batch_keeps_its_plain_fields():
    batch = batch_of([["abc", IMAGE]])
    moved = batch.to("cpu")
    assert moved.segment_lengths == batch.segment_lengths
    assert all(a.equal(b) for a, b in zip(moved.tensors().values(), batch.tensors().values(), strict=True))


@pytest.mark.parametrize(("offset", "end", "last", "expected"), [(0, 3, False, "abc"), (3, 5, False, "de"), (5, 0, True, "f")])
def test_a_piece_of_a_long_text_predicts_all_its_words_and_the_end_only_when_it_ends(offset, end, last, expected):
    """A cut text: every piece begins with <s>, so that its first word is predicted too and no word is lost to a border."""
    bounds = Bounds(0, offset, 1 if last else 0, end, last)
    batch = assemble([segment(["abcdef"], 0, bounds)], SIZE, IMAGE_TOKENS, END)
    targets = batch.targets[: batch.supervised].tolist()
    assert targets == [ord(c) for c in expected] + [END] * last
