"""JSON with an image folder, and what all layouts share: nothing is lost in silence, no name leaves the folder."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imports import COLOURS, PICTURES, left_out, read_ours, read_plain, talk, words, write_json, write_lines
from PIL import Image
from tars import make_image, make_pairs, write_tar

from data_pipeline.importers.records import records
from data_pipeline.samples import BadSample


def llava(count: int) -> list[dict]:
    """LLaVA's instruction data: one image by name, turns of human and gpt, and records of text alone."""
    records = [
        {"id": f"{i:012d}", "image": f"coco/{i}.png", "conversations": talk(f"<image>\nname {i}", COLOURS[i], "sure?", "yes")}
        for i in range(count)
    ]
    return [*records, {"id": "text", "conversations": talk("hello", "hi")}]


@pytest.mark.parametrize("form", ["list", "lines", "indented", "windows"])
def test_jsonl_as_llava_writes_it(tmp_path, demo, images, xc_import, xc_data, form):
    value = llava(4)
    if form == "lines":
        file = write_lines(tmp_path / "llava.jsonl", value)
    else:
        file = write_json(tmp_path / "llava.json", value)
        if form == "indented":
            file.write_text(json.dumps(value, indent=4, ensure_ascii=False))
        if form == "windows":
            file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(v) for v in value).encode())
    xc_import("jsonl", file, tmp_path / "shards", "--images", images)
    plain = read_plain(tmp_path / "shards")
    first = json.loads(plain["00000-000000000"]["json"])
    assert (first["id"], first["image"]) == ("000000000000", "coco/0.png"), "the record stays"
    assert [m.get("0.png") for m in plain.values()] == [*PICTURES[:4], None]
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [*(f"|[{i}]\nname {i}|{COLOURS[i]}.|sure?|yes." for i in range(4)), "|hello|hi."]


def test_jsonl_with_several_images_a_record(tmp_path, demo, images, xc_import, xc_data):
    record = {"image": ["coco/2.png", "coco/0.png"], "conversations": talk("<image> or <image>?", "the second")}
    xc_import("jsonl", write_json(tmp_path / "a.json", [record]), tmp_path / "shards", "--images", images)
    assert [words(e) for e in read_ours(tmp_path / "shards", demo.tokenizer, xc_data).values()] == ["|[2] or [0]?|the second."]


def test_jsonl_with_captions_becomes_pairs(tmp_path, demo, images, xc_import, xc_data):
    file = write_lines(images / "captions.jsonl", [{"image": f"coco/{i}.png", "caption": f"a {c} one"} for i, c in enumerate(COLOURS)])
    xc_import("jsonl", file, tmp_path / "shards")
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == [f"[{i}]a {c} one" for i, c in enumerate(COLOURS)]


def test_jsonl_damage_is_counted_and_never_stops_the_import(tmp_path, images, xc_import):
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
    xc_import("jsonl", file, tmp_path / "shards", "--images", images)
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
def test_no_name_in_foreign_data_leaves_the_image_folder(tmp_path, images, xc_import, name):
    (tmp_path / "secret.png").write_bytes(make_image(9, 9, "gold"))
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "linked").symlink_to(tmp_path)
    (images / "loop").symlink_to(images / "loop")
    hostile = {"image": name.replace("{root}", str(tmp_path)), "caption": "secret"}
    file = write_lines(tmp_path / "a.jsonl", [{"image": "coco/0.png", "caption": "red"}, hostile])
    xc_import("jsonl", file, tmp_path / "shards", "--images", images)
    assert [m["txt"] for m in read_plain(tmp_path / "shards").values()] == [b"red"]
    (reason,) = [d["reason"] for d in left_out(tmp_path / "shards")]
    assert reason.startswith(("image outside the image folder", "image not found"))


def test_absolute_names_and_links_within_the_image_folder_are_allowed(tmp_path, images, xc_import):
    (images / "again.png").symlink_to(images / "coco" / "0.png")
    names = [images / "coco" / "0.png", "again.png", "coco/../coco/0.png"]
    file = write_lines(tmp_path / "a.jsonl", [{"image": str(name), "caption": "red"} for name in names])
    xc_import("jsonl", file, tmp_path / "shards", "--images", images)
    assert [m["png"] for m in read_plain(tmp_path / "shards").values()] == [PICTURES[0]] * 3


def test_image_formats_that_shards_do_not_hold_become_png(tmp_path, images, xc_import):
    for form, suffix in (("GIF", "png"), ("BMP", "png"), ("TIFF", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        (images / "a.jpg").write_bytes(make_image(8, 6, "red", form))  # the name may lie
        xc_import("jsonl", write_lines(images / "a.jsonl", [{"image": "a.jpg", "caption": form}]), tmp_path / form)
        (found,) = read_plain(tmp_path / form).values()
        assert set(found) == {suffix, "txt"}
        assert Image.open(io.BytesIO(found[suffix])).convert("RGB").getpixel((4, 3)) == pytest.approx((255, 0, 0), abs=3)


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


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(("more", "said"), [(" \n\t" * 9, 0), (' \n [{"n": 2}]', 1), ("]", 1), ("\n\0", 1)])
def test_what_follows_a_list_is_named_and_not_dropped_in_silence(tmp_path, monkeypatch, chunk, more, said):
    monkeypatch.setattr("data_pipeline.importers.records.CHUNK", chunk)
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"n": 0}, {"n": 1}]) + more)
    found = [[(row, str(record)) for row, record in records(file, task, 2)] for task in range(2)]
    end = [(2, "the list ends, and more follows it")] * said
    assert found == [[(0, "{'n': 0}"), *end], [(1, "{'n': 1}")]]


@settings(max_examples=100)
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


def test_what_is_not_there_is_a_mistake(tmp_path, images, xc_import):
    assert "nothing to import" in xc_import("parquet", tmp_path / "none", tmp_path / "shards", code=2)
    assert "no .json or .jsonl file" in xc_import("jsonl", images, tmp_path / "shards", code=2)
    assert "no such image folder" in xc_import(
        "jsonl", write_lines(tmp_path / "a.jsonl", llava(1)), tmp_path / "shards", "--images", tmp_path / "none", code=2
    )
    assert "is the source itself" in xc_import("jsonl", images, images, code=2)
    assert "--task" in xc_import("jsonl", images, tmp_path / "shards", "--task", "2/2", code=2)
    assert "holds shards already" in xc_import(
        "jsonl", tmp_path / "a.jsonl", write_tar(tmp_path / "x" / "a.tar", make_pairs(1)).parent, "--images", images, code=2
    )


def test_an_import_that_finds_nothing_usable_says_the_first_reason_and_leaves_nothing(tmp_path, images, xc_import):
    file = write_lines(tmp_path / "a.jsonl", [{"image": f"{i}.png", "caption": "x"} for i in range(3)])
    message = xc_import("jsonl", file, tmp_path / "shards", "--images", images, code=2)
    assert "all was left out, 3 times, first a.jsonl row 0: image not found: 0.png" in message
    assert list((tmp_path / "shards").iterdir()) == []
    assert "3 samples" in xc_import("jsonl", file, tmp_path / "shards", "--images", images / "coco"), "the mistake mended, it runs"
