"""Selections: exactly the samples that a plain loop over the tars would choose, honoured by the plan, and never half there."""

import io
import json
import os
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from demo_data import SEED, data_config, run, segments_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tars import cut, make_conversation, make_document, make_image, make_pairs, write_tar

from data_pipeline.config import SourceConfig
from data_pipeline.errors import UserError
from data_pipeline.opened import open_data
from data_pipeline.plan.order import EpochOrder
from data_pipeline.shards import fingerprint, selection
from data_pipeline.shards.fingerprint import PHASH_BITS, phash, text_digest
from data_pipeline.shards.query import COLUMNS
from data_pipeline.shards.select import band_masks, select
from data_pipeline.shards.source import ShardSource


@pytest.fixture
def index(demo, xc_data) -> Callable[..., Path]:
    """Indexes and merges the tars of a folder."""

    def run(folder: Path, *options: str) -> Path:
        assert xc_data("index", folder, "--tokenizer", demo.tokenizer, *options) == 0
        assert xc_data("merge", folder) == 0
        return folder

    return run


def chosen(source: Path, where: str = "true", unique: tuple[str, ...] = (), near_bits: int = 4, **more: str) -> list[str]:
    """Keys that a selection keeps, in order."""
    folder = source / "selections" / str(random.getrandbits(60))
    made = select(source, None, where, unique, near_bits, "xc-data select ...", folder, **more)
    opened = ShardSource("s", source, None, folder)
    rows = opened.kept(0, int(opened.block_starts[-1]))
    assert (np.diff(rows) > 0).all()
    _, elements = opened.elements(rows)
    assert (made.samples, made.text_tokens, made.images) == (len(rows), elements["tokens"].sum(), (elements["width"] > 0).sum())
    assert sum(made.left_out.values()) == made.of - made.samples
    keys = list(opened.keys())
    return [keys[row] for row in rows]


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A scene of a few large shapes."""
    rng = random.Random(seed)
    image = Image.new("RGB", (96, 80), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(7):
        x, y = rng.randrange(80), rng.randrange(64)
        draw.ellipse((x, y, x + rng.randrange(10, 60), y + rng.randrange(10, 60)), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_a_query_sees_the_documented_columns_of_each_sample(tmp_path, index):
    parts = ["some text", make_image(40, 10), "more of it", make_image(20, 30)]
    write_tar(tmp_path / "a.tar", [*make_document("a", parts), *make_document("b", ["only text"]), *make_document("c", parts[:2])])
    write_tar(tmp_path / "b.tar", make_document("d", parts))
    index(tmp_path)
    for where, keys in {
        "texts = 2 and images = 2": "ad",
        "images = 0 and width_min is null and aspect is null": "b",
        "width_min = 20 and width_max = 40 and height_min = 10 and height_max = 30": "ad",
        "aspect = 4": "acd",
        "shard = 'b.tar'": "d",
        "key in ('b', 'c')": "bc",
        "tokens < (select max(tokens) from samples)": "bc",
        "bytes = 6 * 512": "ad",
        f"list_contains(text_digests, '{text_digest('only text').hex()}')": "b",
        "len(image_digests) = 2 and image_digests[1] <> image_digests[2]": "ad",
        "len(phashes) = images": "abcd",
        "key <> 'a' -- a remark": "bcd",
    }.items():
        assert "".join(chosen(tmp_path, where)) == keys, where


def test_texts_of_a_conversation_are_what_is_said(tmp_path, index):
    turns = [("user", "what is it?"), ("assistant", "a saw"), ("user", "and this?"), ("assistant", "a bull")]
    write_tar(tmp_path / "a.tar", [*make_conversation("a", turns[:2], []), *make_conversation("b", turns, [])])
    index(tmp_path)
    assert [chosen(tmp_path, f"texts = {n}") for n in (2, 4)] == [["a"], ["b"]]


def test_help_names_every_column(xc_data, capsys):
    assert xc_data("select", "--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COLUMNS)
    assert "--unique near-image" in out
    assert "selection: selections/clean" in out


def test_damaged_samples_are_never_selected(tmp_path, index):
    write_tar(tmp_path / "a.tar", [*make_pairs(2), ("bad.png", make_image()), ("bad.txt", b"\xff"), *make_pairs(1)])
    index(tmp_path)
    assert chosen(tmp_path) == ["k0", "k1"]


def test_of_equal_texts_and_of_equal_pictures_the_first_stays(tmp_path, index):
    samples = [
        ("a", 1, "A red  apple"),
        ("b", 2, "a RED apple\n"),  # as a
        ("c", 2, "another thing"),  # its picture was b's, which is gone by then
        ("d", 1, "one more thing"),  # the picture of a
        ("e", 3, "ﬁne"),
        ("f", 4, "fine"),  # as e in Unicode's compatibility form
        ("g", 5, "a red apple!"),
    ]
    members = [m for key, seed, text in samples for m in ((f"{key}.png", encoded(picture(seed))), (f"{key}.txt", text.encode()))]
    write_tar(tmp_path / "a.tar", members[:6])
    write_tar(tmp_path / "b.tar", members[6:])
    index(tmp_path)
    assert "".join(chosen(tmp_path, unique=("text",))) == "acdeg"
    assert "".join(chosen(tmp_path, unique=("image",))) == "abefg"
    assert "".join(chosen(tmp_path, unique=("text", "image"))) == "aceg"
    assert "".join(chosen(tmp_path, unique=("image", "text"))) == "aeg"
    assert "".join(chosen(tmp_path, "key > 'a'", unique=("text",))) == "bcdeg"


def test_documents_are_equal_where_all_their_texts_or_all_their_pictures_are(tmp_path, index):
    one, two = encoded(picture(1)), encoded(picture(2))
    documents = {
        "a": ["x", one, "y", two],
        "b": ["x", two, "y", one],  # the same texts; the same pictures in another order
        "c": ["z", one, two],  # the pictures of a
        "d": ["x", "z"],
        "e": ["y", "z"],  # no picture either
        "f": ["z", one],
    }
    write_tar(tmp_path / "a.tar", [m for key, parts in documents.items() for m in make_document(key, parts)])
    index(tmp_path, "--phash")
    assert "".join(chosen(tmp_path, unique=("text",))) == "acde"
    assert "".join(chosen(tmp_path, unique=("image",))) == "abdef"
    assert "".join(chosen(tmp_path, unique=("near-image",))) == "abdef"


def test_pictures_that_look_alike_are_found_through_scaling_and_encoding(tmp_path, index):
    members = []
    for i in range(12):
        members += [(f"{i}a.png", encoded(picture(i))), (f"{i}a.txt", b"first")]
        members += [(f"{i}b.jpg", encoded(picture(i, 192, 160), "JPEG", quality=80)), (f"{i}b.txt", b"larger JPEG")]
        members += [(f"{i}c.webp", encoded(picture(i, 90, 76), "WEBP", quality=80)), (f"{i}c.txt", b"smaller WebP")]
    members += [m for c in ("red", "blue") for m in ((f"{c}.png", make_image(colour=c)), (f"{c}.txt", b"flat: has no looks"))]
    write_tar(tmp_path / "a.tar", members)
    index(tmp_path, "--phash")
    assert chosen(tmp_path, unique=("near-image",)) == [*(f"{i}a" for i in range(12)), "red", "blue"]
    assert len(chosen(tmp_path, unique=("image",))) == 38


def greedy(hashes: list[int], bits: int) -> list[int]:
    """The definition: a picture stays unless it looks like an earlier one that stays."""
    kept: list[int] = []
    for i, h in enumerate(hashes):
        if all((h ^ hashes[k]).bit_count() > bits for k in kept):
            kept.append(i)
    return kept


def test_near_duplicates_are_those_of_comparing_all_pairs(tmp_path, monkeypatch, index):
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(12)]
    for _ in range(108):  # chains of neighbours, so that A ~ B ~ C without A ~ C occurs
        h = rng.choice(hashes)
        for _ in range(rng.randrange(7)):
            h ^= 1 << rng.randrange(64)
        hashes.append(h)
    wanted = iter(hashes)
    write_tar(tmp_path / "a.tar", [m for i in range(len(hashes)) for m in ((f"{i}.png", make_image()), (f"{i}.txt", b"x"))])
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "phash", lambda _: next(wanted))
        index(tmp_path, "--phash")
    for bits in (0, 1, 4, 8):
        assert chosen(tmp_path, unique=("near-image",), near_bits=bits) == [str(i) for i in greedy(hashes, bits)]


@given(count=st.integers(0, 10**9), bits=st.integers(0, 8), data=st.data())
def test_hashes_that_differ_little_agree_in_some_band(count, bits, data):
    masks = band_masks(count, bits)
    flipped = data.draw(st.lists(st.integers(0, 63), max_size=bits))
    difference = 0
    for bit in flipped:
        difference |= 1 << bit
    assert any(difference & mask == 0 for mask in masks)
    assert all(0 < mask < 1 << PHASH_BITS for mask in masks)


def test_a_perceptual_hash_survives_what_a_web_crawl_does_to_pictures():
    distances = []
    for i in range(10):
        image = picture(i, 240, 200)
        whole = phash(encoded(image))
        for again in (
            encoded(image, "JPEG", quality=60),
            encoded(picture(i, 150, 125), "WEBP", quality=75),
            encoded(image.convert("RGBA")),
            encoded(image.quantize(128)),
        ):
            distances.append((whole ^ phash(again)).bit_count())
    assert sorted(distances)[int(0.95 * len(distances))] <= 4
    others = [(phash(encoded(picture(i))) ^ phash(encoded(picture(j)))).bit_count() for i in range(12) for j in range(i)]
    assert min(others) > 8


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("widht_min > 3", "widht_min"),
        ("tokens =", "syntax error"),
        ("cast(key as int) = 1", "Could not convert string"),
        ("key in (select key from read_csv('/etc/passwd'))", "disabled"),
        ("key in (select content from read_text('/etc/passwd'))", "disabled"),
        ("key in (select file from glob('/etc/*'))", "disabled"),
        ("true) union all select (1", "syntax error"),
        ("true; copy samples to 'stolen.csv'", "statement"),
        ("tokens, images", "single expression"),
        ("", "selection list"),
        ("tokens < 0", "none of 6 samples"),
    ],
)
def test_a_wrong_or_greedy_query_is_one_line_and_leaves_nothing(tmp_path, index, xc_data, capsys, monkeypatch, where, says):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "s" / "a.tar", make_pairs(6))
    index(tmp_path / "s")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert xc_data("select", tmp_path / "s", "--where", where, "-o", tmp_path / "chosen") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.endswith(")")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_command_line_cannot_mean_is_a_mistake(tmp_path, index, xc_data, capsys):
    index(write_tar(tmp_path / "s" / "a.tar", make_pairs(3)).parent)
    (tmp_path / "taken").mkdir()
    for options, says in (
        (["--unique", "sound", "-o", tmp_path / "x"], "give one or more of text,image,near-image"),
        (["--unique", "near-image", "-o", tmp_path / "x"], "--phash, then xc-data merge"),
        (["--near-bits", 9, "-o", tmp_path / "x"], "give 0 to 8"),
        (["-o", tmp_path / "taken"], "exists (remove it"),
    ):
        capsys.readouterr()
        assert xc_data("select", tmp_path / "s", *options) == 2
        assert says in capsys.readouterr().err
    assert list((tmp_path / "taken").iterdir()) == []


def test_names_that_look_like_patterns_are_names(tmp_path, index):
    folder = tmp_path / "it's [a]*"
    write_tar(folder / "a[0-9].tar", make_pairs(2))
    write_tar(folder / "a1.tar", [("z" + n, d) for n, d in make_pairs(2)])
    assert chosen(index(folder), "shard = 'a[0-9].tar'") == ["k0", "k1"]


def test_a_query_larger_than_memory_goes_to_disk_and_cleans_up(demo, tmp_path):
    source = demo.copy("pairs", tmp_path / "pairs")
    assert chosen(source, unique=("text", "image"), memory="24MB") == chosen(source, unique=("text", "image"))
    assert not list((source / "selections").glob(".*"))
    with pytest.raises(UserError, match="memory"):
        chosen(source, unique=("text", "image"), memory="1MB")


def test_a_kill_while_writing_leaves_no_selection(demo, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            select(demo.source("pairs"), None, "true", (), 4, "", tmp_path / "chosen")
    assert list(tmp_path.iterdir()) == []
    select(demo.source("pairs"), None, "true", (), 4, "", tmp_path / "chosen")


# What the plan makes of a selection.


@pytest.fixture
def half(demo, tmp_path, xc_data) -> Path:
    """A selection of about half of the demo's pairs."""
    command = ("select", demo.source("pairs"), "--where", "hash(key) % 2 = 0", "-o", tmp_path / "half")
    assert xc_data(*command) == 0
    return tmp_path / "half"


def test_a_run_draws_each_selected_sample_once_an_epoch_and_no_other(demo, half):
    pairs = str(demo.source("pairs"))
    config = data_config(demo.root, sources={"pairs": SourceConfig(pairs, selection=str(half))})
    rows = [s.sample for step in run(config) for m in step.micro_batches for s in segments_of(m.batch)]
    kept = np.fromfile(half / "kept.bin", "<i8").tolist()
    assert 500 < len(kept) < 1600
    assert sorted(rows) == kept
    plans = [open_data(data_config(demo.root, sources={"pairs": SourceConfig(pairs, selection=s)}), SEED).plan for s in (None, str(half))]
    assert plans[0].digest != plans[1].digest


def test_leaving_samples_out_keeps_the_order_of_the_others(demo, half):
    whole, part = (ShardSource("pairs", demo.source("pairs"), None, s) for s in (None, half))
    kept = set(part.kept(0, int(part.block_starts[-1])).tolist())
    assert len(part.block_starts) == len(whole.block_starts)
    for epoch in range(3):
        orders = [EpochOrder(source, SEED, 5) for source in (whole, part)]
        all_rows, part_rows = (o.rows(epoch, 0, o.samples).tolist() for o in orders)
        assert part_rows == [row for row in all_rows if row in kept]


def test_many_runs_of_a_selection_read_as_one_by_one(demo, half):
    source = ShardSource("pairs", demo.source("pairs"), None, half)
    borders = np.unique(np.random.RandomState(0).randint(0, int(source.block_starts[-1]) + 1, 80))
    firsts, ends = borders[:-1:2], borders[1::2]
    one_by_one = [source.kept(first, end) for first, end in zip(firsts.tolist(), ends.tolist(), strict=False)]
    assert np.array_equal(source.kept_runs(firsts[: len(ends)], ends), np.concatenate(one_by_one))


def test_two_ways_to_the_same_samples_are_the_same_selection(demo, tmp_path):
    a = select(demo.source("pairs"), None, "tokens > 4", (), 4, "one way", tmp_path / "a")
    b = select(demo.source("pairs"), None, "not tokens <= 4", (), 4, "another", tmp_path / "b")
    assert a.digest == b.digest
    sources = [ShardSource("pairs", demo.source("pairs"), None, tmp_path / n) for n in "ab"]
    assert sources[0].digest == sources[1].digest != ShardSource("pairs", demo.source("pairs")).digest


def test_a_selection_of_another_index_is_refused_with_the_command_that_makes_it_again(demo, tmp_path, index, xc_data):
    source = index(write_tar(tmp_path / "it's" / "a.tar", make_pairs(6)).parent)
    assert xc_data("select", source, "--where", "key <> 'k0'", "-o", tmp_path / "chosen") == 0
    index(source, "--phash")  # finds no damage, and so is the same index
    assert int(ShardSource("s", source, None, tmp_path / "chosen").block_starts[-1]) == 5
    write_tar(source / "b.tar", [("z" + n, d) for n, d in make_pairs(2)])
    index(source)
    with pytest.raises(UserError) as refused:
        open_data(data_config(demo.root, sources={"s": SourceConfig(str(source), selection=str(tmp_path / "chosen"))}), SEED)
    message = str(refused.value)
    assert message.startswith("data.sources.s.selection: ")
    command = message[message.index("run: ") + 5 : -1]
    shutil.rmtree(tmp_path / "chosen")
    program, *arguments = shlex.split(command)
    assert program == "xc-data"
    assert xc_data(*arguments) == 0
    assert int(ShardSource("s", source, None, tmp_path / "chosen").block_starts[-1]) == 7


def test_an_index_that_was_not_merged_again_is_refused(tmp_path, index, xc_data, demo):
    source = index(write_tar(tmp_path / "s" / "a.tar", make_pairs(6)).parent)
    write_tar(source / "a.tar", make_pairs(40))
    assert xc_data("index", source, "--tokenizer", demo.tokenizer) == 0
    with pytest.raises(UserError, match="changed since it was merged"):
        select(source, None, "true", (), 4, "", tmp_path / "x")


@pytest.mark.parametrize("column", ["kept.bin", "blocks.bin"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda file: cut(file, file.stat().st_size - 8)])
def test_a_selection_that_lost_rows_is_refused(demo, half, column, harm):
    harm(half / column)
    with pytest.raises(UserError, match=r"data\.sources\.pairs\.selection: .*cut short .*run: xc-data select"):
        ShardSource("pairs", demo.source("pairs"), None, half)


@pytest.mark.parametrize("harm", ["missing", "cut", "another version", "no mapping"])
def test_what_is_no_selection_is_refused(demo, half, harm):
    file = half / selection.FILE
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:40])
    else:
        file.write_text("[]" if harm == "no mapping" else json.dumps({**json.loads(file.read_text()), "version": 0}))
    with pytest.raises(UserError, match=r"data\.sources\.pairs\.selection: .*\(.*xc-data select"):
        ShardSource("pairs", demo.source("pairs"), None, half)
