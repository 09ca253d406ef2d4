"""4KHD's partition: token counts, and what is planned, rendered, cut and laid out being one and the same for images of any size."""

import io
import itertools
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from demo_data import COSTS, SEED, data_config, run, same_step
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from plan_strategies import ArraySource
from tars import make_document, make_image, write_tar

from data_pipeline.batch import Segment, assemble
from data_pipeline.config import DataConfig, ImageConfig, ImageDecoder, ImageRule, SourceConfig
from data_pipeline.errors import UserError
from data_pipeline.inspect.packs import Viewer, walk
from data_pipeline.inspect.simulate import _Walk
from data_pipeline.opened import image_policy, open_data
from data_pipeline.plan import partition
from data_pipeline.plan.columns import ELEMENT
from data_pipeline.plan.partition import NEWLINE, SEPARATOR, PartitionPolicy, content, grid_of, grids, layout, token_count
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.images import decode, image_tokens, load, put_together
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import ImageElement, TextElement, image_size
from data_pipeline.text.templates import render, whole
from data_pipeline.text.tokenizer import Tokenizer

SIZES = st.integers(1, 65_535)
SIDE, TOKENS = 8, 4
POLICY = ImageConfig(size=SIDE, tokens=TOKENS, policy=ImageRule.partition, most_tiles=6)


def picture(width: int, height: int, form: str = "PNG", **options: object) -> bytes:
    """An encoded picture no two places of which are alike."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    out = io.BytesIO()
    Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8)).save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize(("most", "tokens"), [(9, 1561), (16, 2653), (25, 4057), (55, 8737)])
def test_the_token_counts_of_4khd(most, tokens):
    policy = PartitionPolicy(144, 336, most)
    panorama = np.array([(0, 60, 60 * most), (7, 0, 0)], ELEMENT)
    assert policy.image_tokens(panorama).tolist() == [tokens, 0] and policy.most_tokens == tokens
    assert policy.tiles(panorama).tolist() == [most + 1, 0] and policy.most_tiles == most + 1
    assert ImageConfig(tokens=144, policy=ImageRule.partition, most_tiles=most).most_tokens == tokens, "what a login node computes"
    assert grid_of(60, 60 * most, most, 336) == (most, 1)


def reference_grid(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """The official rule as it is written down, in exact fractions: more tiles while they fit, then the padded picture's tiles."""
    if width < height:
        return reference_grid(height, width, most, side)[::-1]
    aspect, across = Fraction(width, height), 1
    while across * ceil(across / aspect) <= most:
        across += 1
    across -= 1
    return ceil(max(1, floor(across * side / aspect)) / Fraction(side)), across


@given(SIZES, SIZES, st.integers(1, 55), st.sampled_from([8, 336, 560]))
@example(2000, 1001, 4, 336)  # less than a pixel over one row
@example(65_535, 1, 55, 8)
def test_the_grid_follows_the_shape_and_keeps_the_limit(width, height, most, side):
    rows, columns = grid_of(width, height, most, side)
    assert (rows, columns) == reference_grid(width, height, most, side)
    assert 1 <= rows * columns <= most
    inner, canvas = content(width, height, (rows, columns), side), (columns * side, rows * side)
    assert all(1 <= a <= b for a, b in zip(inner, canvas, strict=True)) and any(a == b for a, b in zip(inner, canvas, strict=True))
    assert all(b - a < side for a, b in zip(inner, canvas, strict=True)), "no tile is padding alone"
    assert int(token_count(rows, columns, 144)) <= PartitionPolicy(144, side, most).most_tokens
    together = grids(np.array([width, 3]), np.array([height, 5]), most, side)
    assert (int(together[0][0]), int(together[1][0])) == (rows, columns)


@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), st.integers(1, 4))
def test_the_layout_reads_as_the_picture_does(grid, line):
    """By place in the picture: which tile, and which row and column in it, every token shows."""
    rows, columns = grid
    expected = [*(y * line + x if x < line else NEWLINE for y in range(line) for x in range(line + 1)), SEPARATOR]
    for y, x in itertools.product(range(rows * line), range(columns * line + 1)):
        tile = 1 + y // line * columns + x // line
        expected.append(NEWLINE if x == columns * line else tile * line**2 + y % line * line + x % line)
    found = layout(grid, line**2)
    assert found.tolist() == expected and len(found) == token_count(rows, columns, line**2)
    assert sorted(found[found >= 0]) == list(range((rows * columns + 1) * line**2)), "every feature once"


@settings(max_examples=60)
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=4), most=st.integers(1, 7))
def test_planned_is_rendered_is_laid_out(demo_tokenizer, sizes, most):
    config = ImageConfig(size=SIDE, tokens=TOKENS, policy=ImageRule.partition, most_tiles=most)
    words = (len(demo_tokenizer.encode("red apple")), 0, 0)
    policy, elements, records = image_policy(config), [TextElement("red apple")], [words]
    for width, height in sizes:
        elements += [ImageElement(make_image(width, height)), TextElement("red apple")]
        records += [(0, *image_size(elements[-2].data)), words]
    columns = np.array(records, ELEMENT)
    rendered = render(elements, whole(elements), demo_tokenizer, lambda image: image_tokens(image.data, config))
    assert len(rendered.ids) == 2 + int((columns["tokens"] + policy.image_tokens(columns)).sum())
    pictures = [load(element.data, config, None) for element in elements[1::2]]
    segment = Segment(rendered, tuple(t for p in pictures for t in p.tiles), 0, 0, tuple(p.grid for p in pictures))
    batch = assemble([segment, Segment(render(elements[:1], whole(elements[:1]), demo_tokenizer, 0), (), 0, 1)], SIDE, TOKENS, 1)
    M, V = int(policy.tiles(columns).sum()), int(policy.image_tokens(columns).sum())
    assert batch.image_count == len(sizes)
    if not sizes:  # the dummy: one tile, in the padding
        assert (len(batch.images), batch.image_rows.tolist(), batch.image_lengths) == (1, list(range(TOKENS)), (TOKENS,))
        assert set(batch.image_index.tolist()) == {len(batch.input_ids) - 1}
        return
    assert len(batch.images) == M and len(batch.image_index) == len(batch.image_rows) == sum(batch.image_lengths) == V
    assert batch.image_grid.tolist() == [list(p.grid) for p in pictures]
    assert batch.image_index.tolist() == rendered.image_positions.tolist()
    rows = batch.image_rows.tolist()
    assert sorted(r for r in rows if r < M * TOKENS) == list(range(M * TOKENS)), "every feature is placed once"
    assert rows.count(M * TOKENS + 1) == len(sizes), "one separator an image"
    assert rows.count(M * TOKENS) == sum((p.grid[0] + 1) * 2 for p in pictures), "a newline a row"
    assert set(rows) <= set(range(M * TOKENS + 2))


@pytest.mark.parametrize("decoder", ImageDecoder)
@pytest.mark.parametrize(("width", "height", "form"), [(70, 30, "PNG"), (30, 70, "JPEG"), (400, 90, "JPEG"), (5, 5, "PNG")])
def test_tiles_put_together_show_the_resized_picture_on_white(width, height, form, decoder):
    config = ImageConfig(size=16, tokens=TOKENS, policy=ImageRule.partition, most_tiles=6, decoder=decoder)
    data = picture(width, height, form)
    found = load(data, config, None)
    size = content(width, height, found.grid, 16)
    expected = Image.new("RGB", (found.grid[1] * 16, found.grid[0] * 16), "white")
    left, top = (expected.width - size[0]) // 2, (expected.height - size[1]) // 2
    expected.paste(decode(data).resize(size, Image.Resampling.BILINEAR), (left, top))
    wanted = np.asarray(expected).transpose(2, 0, 1).astype(int)
    whole_picture = found.whole().astype(int)
    assert (put_together(np.stack(found.tiles[1:]), found.grid) == found.whole()).all()
    assert np.abs(whole_picture - wanted).max() <= (0 if form == "PNG" or decoder is ImageDecoder.pil else 3)
    view = torch.nn.functional.interpolate(torch.from_numpy(found.whole())[None].float() / 255 - 0.5, (16, 16), mode="bicubic")[0]
    assert np.abs(found.tiles[0] / 255 - 0.5 - view.numpy().clip(-0.5, 0.5)).max() <= 0.5001 / 255, "rounding apart, of the normalised"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_index_and_the_decoder_agree_on_what_is_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(40, 20, form, exif=exif)
    assert image_size(data) == decode(data).size == ((20, 40) if orientation >= 5 else (40, 20))
    assert load(data, POLICY, None).grid == ((3, 2) if orientation >= 5 else (2, 3))


def test_augmentation_leaves_the_grid_and_follows_its_key():
    config = ImageConfig(size=SIDE, tokens=TOKENS, policy=ImageRule.partition, most_tiles=6, crop=0.5, jitter=0.3)
    data = picture(60, 20)
    one, same, other = (load(data, config, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.grid == other.grid == load(data, config, None).grid
    assert (one.whole() == same.whole()).all() and (one.whole() != other.whole()).any()


@pytest.fixture(scope="module")
def demo_tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo.tokenizer)


@pytest.fixture(scope="module")
def partitioned(demo, tmp_path_factory, xc_data) -> DataConfig:
    """Pairs and documents with pictures of many shapes, indexed."""
    root = tmp_path_factory.mktemp("partitioned")
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 60, (40, 2)).tolist()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    pairs = [m for i, s in enumerate(sizes) for m in ((f"p{i}.png", picture(*s, exif=exif)), (f"p{i}.txt", b"a red apple"))]
    documents = [make_document(f"d{i}", ["food fruit", picture(*sizes[i]), "red", picture(*sizes[-i])]) for i in range(12)]
    write_tar(root / "pairs" / "a.tar", pairs)
    write_tar(root / "documents" / "a.tar", [m for document in documents for m in document])
    for name in ("pairs", "documents"):
        assert xc_data("index", root / name, "--tokenizer", demo.tokenizer) == 0
        assert xc_data("merge", root / name) == 0
    sources = {name: SourceConfig(str(root / name)) for name in ("pairs", "documents")}
    settings = {"tokenizer": str(demo.tokenizer), "sources": sources, "images": POLICY, "context": 160, "images_per_pack": 20}
    return data_config(root, **settings, global_batch=4)


def test_batches_hold_what_was_planned_and_do_not_depend_on_the_workers(partitioned):
    alone = list(run(partitioned))
    assert sum(m.batch.image_count for step in alone for m in step.micro_batches) == 40 + 2 * 12, "nothing is dropped"
    for step in alone:
        assert not step.bad
        for micro in step.micro_batches:
            pieces = micro.request.packs
            assert len(micro.batch.images) == max(1, sum(int(p.images.sum()) for p in pieces)) <= 20
            planned = sum(int(p.tokens.sum()) - int((~p.last).sum()) for p in pieces)
            assert sum(micro.batch.segment_lengths[:-1]) == planned <= partitioned.context
    with_workers = list(run(DataConfig(**{**partitioned.__dict__, "workers": 2, "prefetch": 2})))
    assert all(same_step(a, b) for a, b in zip(alone, with_workers, strict=True))


def test_the_page_shows_pictures_put_together(partitioned):
    data = open_data(partitioned, SEED)
    viewer = Viewer(Materialiser(data.sources, data.tokenizer, POLICY, SEED))
    at, pieces = next(walk(data.plan, Cursor(0, 0)))
    batch, [view] = viewer.view([pieces], [at])
    parts = [part for card in view.cards for part in card.parts if part.kind == "image"]
    assert [part.tokens for part in parts] == list(batch.image_lengths)
    assert [part.shown for part in parts] == [f"{c * SIDE} x {r * SIDE}" for r, c in batch.image_grid.tolist()]
    for part, (rows, columns) in zip(parts, batch.image_grid.tolist(), strict=True):
        assert grid_of(*map(int, part.size.split(" x ")), POLICY.most_tiles, SIDE) == (rows, columns)


def test_the_simulation_counts_the_image_tokens_of_the_batches(partitioned):
    walked = list(_Walk(partitioned, open_data(partitioned, SEED), 1, COSTS).steps(99))
    for step, found in zip(walked, run(partitioned), strict=True):
        tokens = sum(len(m.batch.image_index) for m in found.micro_batches if m.batch.image_count)
        assert step.image_tokens == (tokens, tokens)


def test_the_policy_enters_the_digest_and_squares_keep_theirs(demo):
    def digest(**images: object) -> str:
        return open_data(data_config(demo.root, images=ImageConfig(size=32, tokens=4, **images)), 0).plan.digest

    partition_of = {"policy": ImageRule.partition}
    found = [digest(), digest(**partition_of, most_tiles=4), digest(**partition_of, most_tiles=5)]
    assert len(set(found)) == 3
    assert digest(most_tiles=7) == found[0]


def test_shares_of_tokens_count_the_images_own_sizes(monkeypatch):
    elements = np.array([(0, w, h) for w, h in np.random.default_rng(0).integers(1, 500, (5000, 2))], ELEMENT)
    source, policy = ArraySource("a", np.ones(5000, np.int64), elements), PartitionPolicy(144, 336, 9)
    exact = int(policy.image_tokens(elements).sum())
    assert policy.total_tokens(source) == exact
    monkeypatch.setattr(partition, "SAMPLED", 1000)
    monkeypatch.setattr(partition, "RUN", 20)
    assert policy.total_tokens(source) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ImageConfig(32, 6, policy=ImageRule.partition)}, "6 tokens of a tile are no square"),
        ({"images": ImageConfig(32, 4, policy=ImageRule.partition, most_tiles=0)}, "most_tiles is 0"),
        ({"images": ImageConfig(32, 4, policy=ImageRule.partition, most_tiles=60)}, "do not hold an image of 369"),
        ({"images": ImageConfig(32, 4, policy=ImageRule.partition, most_tiles=24)}, "fits no pack of"),
    ],
)
def test_images_that_no_pack_could_hold_are_refused_before_the_run(demo, changes, message):
    with pytest.raises(UserError, match=message):
        open_data(data_config(demo.root, **changes), 0)
