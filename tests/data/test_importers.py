"""Each layout, from files as its own tools write them: read back by plain webdataset and by our index, with nothing lost in silence."""

import io
import json
import random
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from imports import left_out, read_ours, read_plain, write_hugging_face, write_json, write_lines
from PIL import Image
from tars import make_image, make_pairs, write_tar

from data_pipeline.importers import parquet
from data_pipeline.importers.contract import Options
from data_pipeline.importers.records import records
from data_pipeline.samples import AnswerEndElement, BadSample, ImageElement, TextElement, TurnElement
from data_pipeline.shards.index import read_index
from data_pipeline.shards.write import Sample

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "pink", "grey", "brown")
PICTURES = [make_image(8 + i, 6, colour) for i, colour in enumerate(COLOURS)]


@pytest.fixture
def run(xc_data, capsys):
    """Runs `xc-data import`; returns what it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        assert xc_data("import", *arguments) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of pictures: coco/0.png, ..."""
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    for i, picture in enumerate(PICTURES):
        (folder / "coco" / f"{i}.png").write_bytes(picture)
    return folder


def words(elements) -> str:
    """What a person would read, images as [pixels]."""
    marks = {TextElement: lambda e: e.text, ImageElement: lambda e: f"[{PICTURES.index(e.data)}]", TurnElement: lambda e: "|"}
    return "".join(marks.get(type(e), lambda e: "." if isinstance(e, AnswerEndElement) else "")(e) for e in elements)


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(turns)]


# Parquet


def test_parquet_as_hugging_face_writes_it(tmp_path, demo, run, xc_data):
    for part in range(2):
        file = tmp_path / "set" / "data" / f"train-{part:05d}-of-00002.parquet"
        write_hugging_face(file, PICTURES[part * 5 :][:5], 2, caption=[f"a {c} thing" for c in COLOURS[part * 5 :][:5]], id=range(5))
    out = run("parquet", tmp_path / "set", tmp_path / "shards")
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
def test_parquet_columns_are_guessed_or_given(tmp_path, run, columns, options):
    chosen = (
        [options[1], options[3]] if options else [next(iter(columns)), next(n for n in columns if n.lower() in ("txt", "text", "words"))]
    )
    values = {name: ["no"] * 3 if pa.types.is_string(t) or pa.types.is_large_string(t) else [b"no"] * 3 for name, t in columns.items()}
    values[chosen[0]], values[chosen[1]] = PICTURES[:3], COLOURS[:3]
    pq.write_table(pa.table({n: pa.array(values[n], t) for n, t in columns.items()}), tmp_path / "a.parquet")
    run("parquet", tmp_path / "a.parquet", tmp_path / "shards", *options)
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
def test_parquet_columns_that_cannot_be_guessed_are_a_mistake(tmp_path, run, columns, options, message):
    pq.write_table(pa.table({n: pa.array([None], t) for n, t in columns.items()}), tmp_path / "a.parquet")
    assert re.search(message, run("parquet", tmp_path / "a.parquet", tmp_path / "shards", *options, code=2))
    assert read_plain(tmp_path / "shards") == {}


def test_parquet_with_turns_becomes_conversations(tmp_path, demo, run, xc_data):
    turns = [talk(f"<image>\nwhat is {i}?", f"it is {c}") for i, c in enumerate(COLOURS[:3])]
    write_hugging_face(tmp_path / "a.parquet", [*PICTURES[:3], None], 2, conversations=[*turns, talk("hello", "hi")], id=list("abcd"))
    run("parquet", tmp_path / "a.parquet", tmp_path / "shards")
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [*(f"|[{i}]\nwhat is {i}?|it is {COLOURS[i]}." for i in range(3)), "|hello|hi."]


def test_parquet_damage_is_counted_and_never_stops_the_import(tmp_path, run):
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
    out = run("parquet", folder, tmp_path / "shards")
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


# JSON with an image folder


def llava(count: int) -> list[dict]:
    """LLaVA's instruction data: one image by name, turns of human and gpt, and records of text alone."""
    records = [
        {"id": f"{i:012d}", "image": f"coco/{i}.png", "conversations": talk(f"<image>\nname {i}", COLOURS[i], "sure?", "yes")}
        for i in range(count)
    ]
    return [*records, {"id": "text", "conversations": talk("hello", "hi")}]


@pytest.mark.parametrize("form", ["list", "lines", "indented", "windows"])
def test_jsonl_as_llava_writes_it(tmp_path, demo, images, run, xc_data, form):
    value = llava(4)
    if form == "lines":
        file = write_lines(tmp_path / "llava.jsonl", value)
    else:
        file = write_json(tmp_path / "llava.json", value)
        if form == "indented":
            file.write_text(json.dumps(value, indent=4, ensure_ascii=False))
        if form == "windows":
            file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(v) for v in value).encode())
    run("jsonl", file, tmp_path / "shards", "--images", images)
    plain = read_plain(tmp_path / "shards")
    first = json.loads(plain["00000-000000000"]["json"])
    assert (first["id"], first["image"]) == ("000000000000", "coco/0.png"), "the record stays"
    assert [m.get("0.png") for m in plain.values()] == [*PICTURES[:4], None]
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [*(f"|[{i}]\nname {i}|{COLOURS[i]}.|sure?|yes." for i in range(4)), "|hello|hi."]


def test_jsonl_with_several_images_a_record(tmp_path, demo, images, run, xc_data):
    record = {"image": ["coco/2.png", "coco/0.png"], "conversations": talk("<image> or <image>?", "the second")}
    run("jsonl", write_json(tmp_path / "a.json", [record]), tmp_path / "shards", "--images", images)
    assert [words(e) for e in read_ours(tmp_path / "shards", demo.tokenizer, xc_data).values()] == ["|[2] or [0]?|the second."]


def test_jsonl_with_captions_becomes_pairs(tmp_path, demo, images, run, xc_data):
    file = write_lines(images / "captions.jsonl", [{"image": f"coco/{i}.png", "caption": f"a {c} one"} for i, c in enumerate(COLOURS)])
    run("jsonl", file, tmp_path / "shards")
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [f"[{i}]a {c} one" for i, c in enumerate(COLOURS)]


def test_jsonl_damage_is_counted_and_never_stops_the_import(tmp_path, images, run):
    good = llava(2)
    file = write_lines(
        tmp_path / "a.jsonl",
        [
            good[0],
            "{not json",
            "[" * 100_000,
            '"a text"',
            {"image": "coco/none.png", "conversations": talk("<image>", "x")},
            {"image": "coco/0.png", "conversations": talk("<image><image>", "x")},
            {"image": "coco/0.png", "caption": "of another kind"},
            {"image": 7, "conversations": talk("<image>", "x")},
            {"conversations": talk("half a pair", "\ud83d")},
            {"conversations": [{"from": "cat", "value": "meow"}]},
            good[1],
        ],
    )
    run("jsonl", file, tmp_path / "shards", "--images", images)
    assert list(read_plain(tmp_path / "shards")) == ["00000-000000000", "00000-000000010"]
    assert [d["reason"].partition(":")[0] for d in left_out(tmp_path / "shards")] == [
        *["not a record"] * 3,
        "image not found",
        "json wrong",
        "not a conversation",
        "not a record",
        "text is not Unicode",
        "json wrong",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "coco/../../secret.png",
        "{root}/secret.png",
        "link.png",
        "linked/secret.png",
        "/etc/hostname",
        "coco\0.png",
        "a" * 5000,
        ".",
        "loop",
    ],
)
def test_no_name_in_foreign_data_leaves_the_image_folder(tmp_path, images, run, name):
    (tmp_path / "secret.png").write_bytes(make_image(9, 9, "gold"))
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "linked").symlink_to(tmp_path)
    (images / "loop").symlink_to(images / "loop")
    hostile = {"image": name.replace("{root}", str(tmp_path)), "caption": "secret"}
    file = write_lines(tmp_path / "a.jsonl", [{"image": "coco/0.png", "caption": "red"}, hostile])
    run("jsonl", file, tmp_path / "shards", "--images", images)
    assert [m["txt"] for m in read_plain(tmp_path / "shards").values()] == [b"red"]
    (reason,) = [d["reason"] for d in left_out(tmp_path / "shards")]
    assert reason.startswith(("image outside the image folder", "image not found"))


def test_absolute_names_and_links_within_the_image_folder_are_allowed(tmp_path, images, run):
    (images / "again.png").symlink_to(images / "coco" / "0.png")
    names = [images / "coco" / "0.png", "again.png", "coco/../coco/0.png"]
    file = write_lines(tmp_path / "a.jsonl", [{"image": str(name), "caption": "red"} for name in names])
    run("jsonl", file, tmp_path / "shards", "--images", images)
    assert [m["png"] for m in read_plain(tmp_path / "shards").values()] == [PICTURES[0]] * 3


def test_image_formats_that_shards_do_not_hold_become_png(tmp_path, images, run):
    for form, suffix in (("GIF", "png"), ("BMP", "png"), ("TIFF", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        (images / "a.jpg").write_bytes(make_image(8, 6, "red", form))  # the name may lie
        run("jsonl", write_lines(images / "a.jsonl", [{"image": "a.jpg", "caption": form}]), tmp_path / form)
        (found,) = read_plain(tmp_path / form).values()
        assert set(found) == {suffix, "txt"}
        assert Image.open(io.BytesIO(found[suffix])).convert("RGB").getpixel((4, 3)) == pytest.approx((255, 0, 0), abs=3)


# A list is read as a stream


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_a_list_is_the_same_list_whatever_is_read_at_once(tmp_path, monkeypatch, chunk):
    value = [{"n": i, "text": '\\"]},[{' * (i % 4), "deep": [[{}]] * i} for i in range(20)]
    monkeypatch.setattr("data_pipeline.importers.records.CHUNK", chunk)
    for file in (write_json(tmp_path / "a.json", value), tmp_path / "b.json"):
        file.write_text(json.dumps(value, indent=2 if file.name == "b.json" else None))
        if chunk == 1:
            file.write_text(file.read_text().lstrip())
        assert [record for _, record in records(file)] == value
        shares = [list(records(file, task, 3)) for task in range(3)]
        assert sorted((pair for share in shares for pair in share), key=lambda pair: pair[0]) == list(enumerate(value))


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.99])
def test_a_list_that_breaks_off_gives_what_is_whole_and_one_reason(tmp_path, cut):
    text = json.dumps([{"n": i, "text": "x" * 50} for i in range(100)])
    (tmp_path / "a.json").write_text(text[: int(len(text) * cut)])
    found = [record for _, record in records(tmp_path / "a.json")]
    assert found[:-1] == [{"n": i, "text": "x" * 50} for i in range(len(found) - 1)]
    assert isinstance(found[-1], BadSample)
    assert 15 < len(found) <= 100


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_bytes_at_all_make_reading_records_raise(tmp_path_factory, data):
    """Arbitrary bytes, and good lists and lines with a few bytes changed."""
    file = tmp_path_factory.mktemp("bytes") / "a.json"
    good = [json.dumps(llava(3)).encode(), "\n".join(json.dumps(r) for r in llava(3)).encode()]
    content = bytearray(
        data.draw(st.one_of(st.binary(max_size=200), st.sampled_from(good), st.binary(max_size=50).map(lambda b: b"[" + b)))
    )
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    found = list(records(file))
    assert [row for row, _ in found] == list(range(len(found)))
    assert all(isinstance(record, (dict, BadSample)) for _, record in found)


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


# The official fine-tuning format


def official(tmp_path: Path) -> Path:
    """The official example in small: data.txt beside data/*.json, images relative to where the script starts."""
    root = tmp_path / "finetune"
    (root / "data" / "images").mkdir(parents=True)
    for i, picture in enumerate(PICTURES):
        (root / "data" / "images" / f"{i}.png").write_bytes(picture)
    turns = [{"from": "user", "value": "First: <ImageHere>; second: <ImageHere>. Same?"}, {"from": "assistant", "value": "No."}]
    write_json(root / "data" / "vl.json", [{"id": "0", "image": ["data/images/0.png", "data/images/1.png"], "conversations": turns}] * 3)
    bot = [{"from": "human", "value": "hello"}, {"from": "bot", "value": "hi"}]
    write_json(root / "data" / "text only.json", [{"id": 0, "conversations": bot}] * 2)
    (root / "data.txt").write_text("data/vl.json 10\ndata/text only.json 0.02\n\n")
    return root


def test_xcomposer_mixtures_become_sources_with_the_official_weights(tmp_path, demo, run, xc_data):
    out = run("xcomposer", official(tmp_path) / "data.txt", tmp_path / "shards")
    section = yaml.safe_load(out[out.index("data:\n") :])
    assert section["data"]["unit"] == "samples"
    assert section["data"]["sources"] == {
        "vl": {"path": str(tmp_path / "shards" / "vl"), "weight": "10"},
        "text_only": {"path": str(tmp_path / "shards" / "text_only"), "weight": "0.02"},
    }
    ours = read_ours(tmp_path / "shards" / "vl", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == ["|First: [0]; second: [1]. Same?|No.."] * 3
    assert [words(e) for e in read_ours(tmp_path / "shards" / "text_only", demo.tokenizer, xc_data).values()] == ["|hello|hi."] * 2
    config = {**section["data"], "tokenizer": str(demo.tokenizer), "context": 256, "global_batch": 2, "images": {"size": 28, "tokens": 4}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump({"data": config}))
    assert xc_data("preview", tmp_path / "stage.yaml", "-o", tmp_path / "page.html") == 0, "the printed section is a config's"


def test_xcomposer_takes_one_json_too(tmp_path, run):
    root = official(tmp_path)
    run("xcomposer", root / "data" / "vl.json", tmp_path / "shards", "--images", root)
    assert len(read_plain(tmp_path / "shards")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no file"),
        ("data/none.json 1", r"line 1: no such file .*none\.json"),
        ("data/vl.json 1\ndata/text only.json", "some files have a weight"),
        ("data/vl.json often", r"no such file .*vl\.json often"),
    ],
)
def test_a_mixture_that_is_none_is_a_mistake(tmp_path, run, content, message):
    file = official(tmp_path) / "data.txt"
    file.write_text(content)
    assert re.search(message, run("xcomposer", file, tmp_path / "shards", code=2))
    assert not (tmp_path / "shards").exists()


def test_files_of_one_name_stay_two_sources(tmp_path, run):
    root = official(tmp_path)
    (root / "more").mkdir()
    shutil.copy(root / "data" / "vl.json", root / "more" / "vl.json")
    (root / "data.txt").write_text("data/vl.json\nmore/vl.json\n")
    out = run("xcomposer", root / "data.txt", tmp_path / "shards")
    section = yaml.safe_load(out[out.index("data:\n") :])["data"]
    assert section["unit"] == "epochs"
    assert set(section["sources"]) == {"vl", "vl_2"}
    assert len(read_plain(tmp_path / "shards" / "vl_2")) == 3


# Documents


def url(i: int) -> str:
    return f"https://example.org/{i}.png?size=large"


def obelics(path: Path) -> Path:
    """Rows as OBELICS has them: parallel lists with nulls, metadata as JSON text."""
    texts = [["first words", None, "then more", None], [None, "a caption"], ["no picture here", None], [None, "gone"]]
    images = [[None, url(0), None, url(1)], [url(2), None], [None, url(99)], [url(98), None]]
    images[0][3] = url(97)
    metadata = [json.dumps([None if u is None else {"src": u} for u in row]) for row in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"images": images, "metadata": metadata, "general_metadata": ["{}"] * 4, "texts": texts})
    pq.write_table(table, path, row_group_size=2)
    return path


def map_as(form: str, tmp_path: Path, images: Path) -> tuple[Path, Path]:
    """(map, image folder) in each of the forms."""
    if form == "lines":
        return write_lines(tmp_path / "map.jsonl", [{"url": url(i), "file": f"coco/{i}.png"} for i in range(10)]), images
    if form == "parquet":
        pq.write_table(
            pa.table({"url": [url(i) for i in range(10)], "file": [f"coco/{i}.png" for i in range(10)]}), tmp_path / "map.parquet"
        )
        return tmp_path / "map.parquet", images
    fetched = tmp_path / "fetched"  # as img2dataset leaves it with --output_format files
    (fetched / "00000").mkdir(parents=True)
    for i in range(10):
        (fetched / "00000" / f"{i:09d}.jpg").write_bytes(PICTURES[i])
    status = ["success"] * 10 + ["failed_to_download"]
    keys = [f"{i:09d}" for i in range(11)]
    pq.write_table(pa.table({"url": [url(i) for i in range(11)], "key": keys, "status": status}), fetched / "00000.parquet")
    write_json(fetched / "00000_stats.json", {"count": 11})
    return fetched, fetched


@pytest.mark.parametrize("form", ["lines", "parquet", "img2dataset"])
def test_obelics_documents_keep_their_order_and_name_the_images_that_are_gone(tmp_path, demo, images, run, xc_data, form):
    image_map, folder = map_as(form, tmp_path, images)
    out = run("obelics", obelics(tmp_path / "docs" / "a.parquet"), tmp_path / "shards", "--images", folder, "--map", image_map)
    assert "left out: 3 x image of a document" in out
    assert "left out: 2 x no image of the document is left" in out
    plain = read_plain(tmp_path / "shards")
    first = json.loads(plain["00000-000000000"]["json"])
    assert first == {"texts": ["first words", None, "then more"], "images": [None, "0.png", None]}
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == ["first words[0]then more", "[2]a caption"]
    first_left_out = left_out(tmp_path / "shards")[0]
    assert (first_left_out["row"], url(97) in first_left_out["reason"]) == (0, True)


def test_mmc4_documents_have_each_image_before_its_sentence(tmp_path, demo, images, run, xc_data):
    info = [
        {"image_name": f"{i}.png", "raw_url": url(i), "matched_text_index": at, "matched_sim": 0.3} for i, at in ((0, 2), (1, 0), (2, 2))
    ]
    documents = [
        {"text_list": ["one.", "two.", "three.", "four."], "image_info": info, "similarity_matrix": [[0.1] * 4] * 3, "url": "x"},
        {"text_list": ["one."], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
        {"text_list": ["one."], "image_info": [{"image_name": "none.png", "matched_text_index": 0}]},
    ]
    out = run("mmc4", write_lines(tmp_path / "docs_shard_0_v2.jsonl", documents), tmp_path / "shards", "--images", images / "coco")
    assert [words(e) for e in read_ours(tmp_path / "shards", demo.tokenizer, xc_data).values()] == ["[1]one. two.[0][2]three. four."]
    assert "left out: 1 x not a document" in out
    assert "left out: 1 x no image of the document is left" in out


# img2dataset: in place


def test_img2dataset_folders_are_indexed_in_place_without_their_side_files(tmp_path, demo, run, xc_data):
    folder = tmp_path / "laion"
    for shard in range(2):
        members = [m for i in range(3) for m in img2dataset_sample(shard, i)]
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"url": ["x"], "key": ["y"]}), folder / f"{shard:05d}.parquet")
    write_json(folder / "00000_stats.json", {"count": 3})
    before = {f: f.read_bytes() for f in folder.iterdir()}
    out = run("img2dataset", folder, tmp_path / "index", "--tokenizer", demo.tokenizer)
    assert "read in place; only an index is made" in out
    assert "1 without a _stats.json" in out
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    assert xc_data("merge", folder, "--index-dir", tmp_path / "index") == 0
    statuses = [read_index(f).table["status"].to_pylist() for f in sorted((tmp_path / "index").glob("*.index.parquet"))]
    assert statuses == [["ok"] * 3] * 2
    run("img2dataset", folder, folder, "--tokenizer", demo.tokenizer)
    assert xc_data("merge", folder) == 0


def img2dataset_sample(shard: int, i: int) -> list[tuple[str, bytes]]:
    key = f"{shard:05d}{i:04d}"
    meta = {"url": url(i), "caption": f"a {COLOURS[i]} thing", "key": key, "status": "success", "width": 8, "height": 6}
    image = make_image(8, 6, COLOURS[i], "JPEG")
    return [(f"{key}.jpg", image), (f"{key}.txt", meta["caption"].encode()), (f"{key}.json", json.dumps(meta).encode())]


# What all layouts share


def test_what_is_not_there_is_a_mistake(tmp_path, images, run):
    assert "nothing to import" in run("parquet", tmp_path / "none", tmp_path / "shards", code=2)
    assert "no .json or .jsonl file" in run("jsonl", images, tmp_path / "shards", code=2)
    assert "no such image folder" in run(
        "jsonl", write_lines(tmp_path / "a.jsonl", llava(1)), tmp_path / "shards", "--images", tmp_path / "none", code=2
    )
    assert "is the source itself" in run("jsonl", images, images, code=2)
    assert "--task" in run("jsonl", images, tmp_path / "shards", "--task", "2/2", code=2)
    assert "holds shards already" in run(
        "jsonl", tmp_path / "a.jsonl", write_tar(tmp_path / "x" / "a.tar", make_pairs(1)).parent, "--images", images, code=2
    )


def test_an_import_that_finds_nothing_usable_says_the_first_reason_and_leaves_nothing(tmp_path, images, run):
    file = write_lines(tmp_path / "a.jsonl", [{"image": f"{i}.png", "caption": "x"} for i in range(3)])
    message = run("jsonl", file, tmp_path / "shards", "--images", images, code=2)
    assert "all was left out, 3 times, first a.jsonl row 0: image not found: 0.png" in message
    assert list((tmp_path / "shards").iterdir()) == []
    assert "3 samples" in run("jsonl", file, tmp_path / "shards", "--images", images / "coco"), "the mistake mended, it runs"
