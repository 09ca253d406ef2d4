"""Layouts of other projects, from files as their own tools write them: read back by plain webdataset and by our index."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from imports import COLOURS, PICTURES, left_out, read_ours, read_plain, words, write_json, write_lines
from tars import make_image, write_tar

from data_pipeline.importers.xcomposer import mixture
from data_pipeline.shards.index import read_index


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


def test_xcomposer_mixtures_become_sources_with_the_official_weights(tmp_path, demo, xc_import, xc_data):
    out = xc_import("xcomposer", official(tmp_path) / "data.txt", tmp_path / "shards")
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


@pytest.mark.parametrize("gap", ["\t", "  ", " \t "])
def test_a_weight_may_stand_behind_any_white_space(tmp_path, gap):
    file = official(tmp_path) / "data.txt"
    file.write_text(f"data/vl.json{gap}10 \n data/text only.json{gap}0.02\n")
    assert [(part.file.name, part.weight) for part in mixture(file)] == [("vl.json", "10"), ("text only.json", "0.02")]


def test_xcomposer_takes_one_json_too(tmp_path, xc_import):
    root = official(tmp_path)
    xc_import("xcomposer", root / "data" / "vl.json", tmp_path / "shards", "--images", root)
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
def test_a_mixture_that_is_none_is_a_mistake(tmp_path, xc_import, content, message):
    file = official(tmp_path) / "data.txt"
    file.write_text(content)
    assert re.search(message, xc_import("xcomposer", file, tmp_path / "shards", code=2))
    assert not (tmp_path / "shards").exists()


def test_files_of_one_name_stay_two_sources(tmp_path, xc_import):
    root = official(tmp_path)
    (root / "more").mkdir()
    shutil.copy(root / "data" / "vl.json", root / "more" / "vl.json")
    (root / "data.txt").write_text("data/vl.json\nmore/vl.json\n")
    out = xc_import("xcomposer", root / "data.txt", tmp_path / "shards")
    section = yaml.safe_load(out[out.index("data:\n") :])["data"]
    assert section["unit"] == "epochs"
    assert set(section["sources"]) == {"vl", "vl_2"}
    assert len(read_plain(tmp_path / "shards" / "vl_2")) == 3


def url(i: int) -> str:
    return f"https://example.org/{i}.png?size=large"


def obelics(path: Path) -> Path:
    """Rows as OBELICS has them: parallel lists with nulls, metadata as JSON text."""
    texts = [["first words", None, "then more", None, "and an end"], [None, "a caption"], ["no picture here", None], [None, "gone"]]
    images = [[None, url(0), None, url(1), None], [url(2), None], [None, url(99)], [url(98), None]]
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
def test_obelics_documents_keep_their_order_and_name_the_images_that_are_gone(tmp_path, demo, images, xc_import, xc_data, form):
    image_map, folder = map_as(form, tmp_path, images)
    out = xc_import("obelics", obelics(tmp_path / "docs" / "a.parquet"), tmp_path / "shards", "--images", folder, "--map", image_map)
    assert "left out: 3 x image of a document" in out
    assert "left out: 2 x no image of the document is left" in out
    plain = read_plain(tmp_path / "shards")
    first = json.loads(plain["00000-000000000"]["json"])
    assert first == {"texts": ["first words", None, "then more\n\nand an end"], "images": [None, "0.png", None]}
    ours = read_ours(tmp_path / "shards", demo.tokenizer, xc_data)
    assert [words(e) for e in ours.values()] == ["first words[0]then more\n\nand an end", "[2]a caption"]
    first_left_out = left_out(tmp_path / "shards")[0]
    assert (first_left_out["row"], url(97) in first_left_out["reason"]) == (0, True)


@pytest.mark.parametrize("images", [[[{"bytes": b"x", "path": "p"}, None]], [[b"x", None]]])
def test_obelics_images_that_are_no_names_are_refused_in_words(tmp_path, images, xc_import):
    pq.write_table(pa.table({"images": images, "texts": [[None, "a caption"]]}), tmp_path / "a.parquet")
    (tmp_path / "images").mkdir()
    said = xc_import("obelics", tmp_path / "a.parquet", tmp_path / "shards", "--images", tmp_path / "images", code=2)
    assert "neither text nor null" in said


def test_mmc4_documents_have_each_image_before_its_sentence(tmp_path, demo, images, xc_import, xc_data):
    info = [
        {"image_name": f"{i}.png", "raw_url": url(i), "matched_text_index": at, "matched_sim": 0.3} for i, at in ((0, 2), (1, 0), (2, 2))
    ]
    documents = [
        {"text_list": ["one.", "two.", "three.", "four."], "image_info": info, "similarity_matrix": [[0.1] * 4] * 3, "url": "x"},
        {
            "text_list": ["one.", "two."],
            "image_info": [{"image_name": name, "matched_text_index": i} for i, name in enumerate(("0.png", "gone.png"))],
        },
        {"text_list": ["one."], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
        {"text_list": ["one."], "image_info": [{"image_name": "none.png", "matched_text_index": 0}]},
    ]
    out = xc_import("mmc4", write_lines(tmp_path / "docs_shard_0_v2.jsonl", documents), tmp_path / "shards", "--images", images / "coco")
    assert [words(e) for e in read_ours(tmp_path / "shards", demo.tokenizer, xc_data).values()] == [
        "[1]one. two.[0][2]three. four.",
        "[0]one. two.",
    ]
    assert "left out: 1 x not a document" in out
    assert "left out: 1 x no image of the document is left" in out


def test_img2dataset_folders_are_indexed_in_place_without_their_side_files(tmp_path, demo, xc_import, xc_data):
    folder = tmp_path / "laion"
    for shard in range(2):
        members = [m for i in range(3) for m in img2dataset_sample(shard, i)]
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"url": ["x"], "key": ["y"]}), folder / f"{shard:05d}.parquet")
    write_json(folder / "00000_stats.json", {"count": 3})
    before = {f: f.read_bytes() for f in folder.iterdir()}
    out = xc_import("img2dataset", folder, tmp_path / "index", "--tokenizer", demo.tokenizer)
    assert "read in place; only an index is made" in out
    assert "1 without a _stats.json" in out
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    assert xc_data("merge", folder, "--index-dir", tmp_path / "index") == 0
    statuses = [read_index(f).table["status"].to_pylist() for f in sorted((tmp_path / "index").glob("*.index.parquet"))]
    assert statuses == [["ok"] * 3] * 2
    xc_import("img2dataset", folder, folder, "--tokenizer", demo.tokenizer)
    assert xc_data("merge", folder) == 0


def img2dataset_sample(shard: int, i: int) -> list[tuple[str, bytes]]:
    key = f"{shard:05d}{i:04d}"
    meta = {"url": url(i), "caption": f"a {COLOURS[i]} thing", "key": key, "status": "success", "width": 8, "height": 6}
    image = make_image(8, 6, COLOURS[i], "JPEG")
    return [(f"{key}.jpg", image), (f"{key}.txt", meta["caption"].encode()), (f"{key}.json", json.dumps(meta).encode())]
