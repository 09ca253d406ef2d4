"""Parquet with image bytes, as its own tools write it: columns guessed or given, damage counted, nothing lost in silence."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from imports import COLOURS, PICTURES, left_out, read_ours, read_plain, talk, words, write_hugging_face

from data_pipeline.importers import parquet
from data_pipeline.importers.contract import Options
from data_pipeline.shards.write import Sample


def test_parquet_as_hugging_face_writes_it(tmp_path, demo, xc_import, xc_data):
    for part in range(2):
        file = tmp_path / "set" / "data" / f"train-{part:05d}-of-00002.parquet"
        write_hugging_face(file, PICTURES[part * 5 :][:5], 2, caption=[f"a {c} thing" for c in COLOURS[part * 5 :][:5]], id=range(5))
    out = xc_import("parquet", tmp_path / "set", tmp_path / "shards")
    assert "10 samples in 1 shards" in out
    plain = read_plain(tmp_path / "shards")
    assert [(m["png"], m["txt"].decode()) for m in plain.values()] == [(p, f"a {c} thing") for p, c in zip(PICTURES, COLOURS, strict=True)]
    assert list(plain)[5] == "00001-000000000", "file and row"
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [f"[{i}]a {c} thing" for i, c in enumerate(COLOURS)]


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"jpg": pa.binary(), "txt": pa.string()}, ()),
        ({"image_bytes": pa.large_binary(), "TEXT": pa.large_string(), "url": pa.string()}, ()),
        ({"payload": pa.binary(), "words": pa.string()}, ()),
        ({"a": pa.binary(), "b": pa.binary(), "c": pa.string(), "d": pa.string()}, ("--image-column", "b", "--text-column", "d")),
        ({"image": pa.binary(), "thumb": pa.binary(), "text": pa.string()}, ()),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_parquet_columns_are_guessed_or_given(tmp_path, xc_import, columns, options):
    chosen = (
        [options[1], options[3]] if options else [next(iter(columns)), next(n for n in columns if n.lower() in ("txt", "text", "words"))]
    )
    values = {name: ["no"] * 3 if pa.types.is_string(t) or pa.types.is_large_string(t) else [b"no"] * 3 for name, t in columns.items()}
    values[chosen[0]], values[chosen[1]] = PICTURES[:3], COLOURS[:3]
    pq.write_table(pa.table({n: pa.array(values[n], t) for n, t in columns.items()}), tmp_path / "a.parquet")
    xc_import("parquet", tmp_path / "a.parquet", tmp_path / "shards", *options)
    assert [(m["png"], m["txt"].decode()) for m in read_plain(tmp_path / "shards").values()] == list(
        zip(PICTURES[:3], COLOURS, strict=False)
    )


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": pa.binary(), "b": pa.binary(), "text": pa.string()},
            (),
            r"cannot guess the column of images \(those that could be: a, b; --image-column\)",
        ),
        ({"image": pa.int64(), "text": pa.string()}, (), r"cannot guess the column of images \(none of its columns could be: image, text"),
        (
            {"image": pa.binary(), "c": pa.string(), "d": pa.string()},
            (),
            r"cannot guess the column of texts \(those that could be: c, d; --text-column",
        ),
        ({"image": pa.binary(), "text": pa.string()}, ("--image-column", "text"), r"column 'text' holds no images"),
    ],
)
def test_parquet_columns_that_cannot_be_guessed_are_a_mistake(tmp_path, xc_import, columns, options, message):
    pq.write_table(pa.table({n: pa.array([None], t) for n, t in columns.items()}), tmp_path / "a.parquet")
    assert re.search(message, xc_import("parquet", tmp_path / "a.parquet", tmp_path / "shards", *options, code=2))
    assert read_plain(tmp_path / "shards") == {}


def test_parquet_with_turns_becomes_conversations(tmp_path, demo, xc_import, xc_data):
    turns = [talk(f"<image>\nwhat is {i}?", f"it is {c}") for i, c in enumerate(COLOURS[:3])]
    write_hugging_face(tmp_path / "a.parquet", [*PICTURES[:3], None], 2, conversations=[*turns, talk("hello", "hi")], id=list("abcd"))
    xc_import("parquet", tmp_path / "a.parquet", tmp_path / "shards")
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [*(f"|[{i}]\nwhat is {i}?|it is {COLOURS[i]}." for i in range(3)), "|hello|hi."]


def test_parquet_damage_is_counted_and_never_stops_the_import(tmp_path, xc_import):
    """A row without an image, one that is no image, a row group and a whole file that cannot be read."""
    folder = tmp_path / "set"
    write_hugging_face(folder / "a.parquet", [PICTURES[0], None, b"no image", *PICTURES[3:]], 2, caption=COLOURS)
    table = pq.ParquetFile(folder / "a.parquet")
    offset = table.metadata.row_group(2).column(0).data_page_offset
    data = bytearray((folder / "a.parquet").read_bytes())
    data[offset : offset + 40] = b"\xff" * 40
    (folder / "a.parquet").write_bytes(data)
    (folder / "b.parquet").write_bytes(data[:500])
    write_hugging_face(folder / "c.parquet", PICTURES[:1], 2, caption=["", "last"][1:])
    out = xc_import("parquet", folder, tmp_path / "shards")
    kept = [m["txt"].decode() for m in read_plain(tmp_path / "shards").values()]
    assert kept == ["red", "white", *COLOURS[6:], "last"]
    found = [(d["file"], d["row"], d["count"], d["reason"].partition(":")[0]) for d in left_out(tmp_path / "shards")]
    assert found == [
        ("a.parquet", 1, 1, "not a pair"),
        ("a.parquet", 2, 1, "image header unreadable"),
        ("a.parquet", 4, 2, "row group unreadable"),
        ("b.parquet", 0, 1, "not a Parquet file"),
    ]
    assert "left out: 2 x row group unreadable" in out


@pytest.mark.parametrize("seed", range(3))
def test_parquet_with_changed_bytes_never_stops_an_import(tmp_path, seed):
    """Whatever bytes of one file change, the whole file beside it is read to its end."""
    good = write_hugging_face(tmp_path / "b.parquet", PICTURES, 5, caption=[f"a {c} thing" for c in COLOURS]).read_bytes()
    rng = random.Random(seed)
    for _ in range(20):
        content = bytearray(good)
        for _ in range(rng.choice([1, 3, 9])):
            content[rng.randrange(4, len(content))] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(content)
        files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
        found = list(parquet.samples(files, Options(tmp_path, image_column="image", text_column="caption"), 0, 1))
        assert [item.key for item in found if isinstance(item, Sample)][-10:] == [f"00001-{i:09d}" for i in range(10)]
