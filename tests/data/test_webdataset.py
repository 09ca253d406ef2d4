"""Shards are ordinary WebDataset tars: plain `webdataset` reads ours without any code of this project, and we read what it writes."""

import io
import json
from pathlib import Path

import pytest
import webdataset
from imports import read_ours
from PIL import Image
from tars import make_image, make_pairs, write_tar

from data_pipeline.samples import ImageElement, TextElement
from data_pipeline.shards.source import ShardSource
from data_pipeline.shards.write import Limits, Sample, write_task

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
SHARDS = sorted(DEMO.rglob("*.tar"))


@pytest.mark.parametrize("shard", SHARDS, ids=lambda s: str(s.relative_to(DEMO)))
def test_plain_webdataset_reads_the_shard(shard):
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len({s["__key__"] for s in samples}) == len(samples) > 0
    for sample in samples:
        if "json" in sample:
            document = json.loads(sample["json"])
            assert all((t is None) != (i is None) for t, i in zip(document["texts"], document["images"], strict=True))
            assert all(name in sample for name in document["images"] if name is not None)
        else:
            assert sample["txt"].decode().strip()
    pictures = [v for s in samples for k, v in s.items() if k.rpartition(".")[2] in ("webp", "jpg", "png")]
    for picture in pictures[:20]:
        Image.open(io.BytesIO(picture)).load()


def test_webdataset_decodes_pairs_as_its_users_write_it():
    pairs = webdataset.WebDataset(str(DEMO / "pairs" / "train-000000.tar"), shardshuffle=False).decode("pil").to_tuple("webp", "txt")
    image, text = next(iter(pairs))
    assert image.size == (72, 72)
    assert isinstance(text, str)


def test_shards_written_here_are_read_as_webdataset_users_read_theirs(tmp_path):
    pairs = [Sample(f"k{i}", {"png": make_image(8 + i), "txt": f"número {i}".encode(), "json": b'{"i": 1}'}) for i in range(10)]
    write_task(tmp_path, {}, 0, 1, pairs, Limits(samples=4))
    shards = str(tmp_path / "part-00000-{000000..000002}.tar")
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "txt", "json"))
    assert [(image.shape, text, meta) for image, text, meta in read] == [((6, 8 + i, 3), f"número {i}", {"i": 1}) for i in range(10)]


def written_by_webdataset(folder: Path, samples: list[dict]) -> Path:
    """Three samples a shard, by `webdataset.ShardWriter` and its own encoders."""
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=3, verbose=0) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"folder/{i:04d}", **sample})
    return folder


PICTURE = Image.new("RGB", (9, 7), "teal")
TURNS = [{"from": "user", "value": "<ImageHere>what is it?"}, {"from": "assistant", "value": "a colour"}]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"jpg": PICTURE, "txt": "a colour"}, "[9x7]a colour"),
        ({"PNG": make_image(9, 7), "txt": "a colour", "json": {"width": 9}, "cls": 3}, "[9x7]a colour"),
        ({"txt": "words alone"}, "words alone"),
        ({"json": {"texts": ["one", None, "two"], "images": [None, "0.png", None]}, "0.png": PICTURE}, "one[9x7]two"),
        ({"json": {"conversations": TURNS}, "0.jpg": PICTURE}, "[9x7]what is it?a colour"),
        ({"json": {"conversations": TURNS}, "jpg": PICTURE}, "[9x7]what is it?a colour"),
    ],
    ids=["pair", "pair with side files", "text", "document", "conversation", "conversation with one image"],
)
def test_shards_that_plain_webdataset_wrote_are_read_here(tmp_path, demo, xc_data, sample, expected):
    ours = read_ours(written_by_webdataset(tmp_path / "theirs", [sample] * 7), demo.tokenizer, xc_data)
    assert list(ours) == [f"folder/{i:04d}" for i in range(7)]
    assert {shown(elements) for elements in ours.values()} == {expected}


def shown(elements) -> str:
    sizes = {e.data: "[{}x{}]".format(*Image.open(io.BytesIO(e.data)).size) for e in elements if isinstance(e, ImageElement)}
    parts = (e.text if isinstance(e, TextElement) else sizes[e.data] for e in elements if isinstance(e, (TextElement, ImageElement)))
    return "".join(parts)


def test_shards_as_img2dataset_writes_them_are_read_here(tmp_path, demo, xc_data):
    """Its writer: webdataset's TarWriter on a stream of its own; encoded image, caption as text, metadata as indented JSON."""
    for shard in range(2):
        with (tmp_path / f"{shard:05d}.tar").open("wb") as file, webdataset.TarWriter(file) as writer:
            for i in range(5):
                key = f"{shard:05d}{i:04d}"
                meta = {"caption": f"red apple {i}", "url": "https://example.org/a b.jpg", "key": key, "status": "success", "exif": "{}"}
                image = make_image(9 + i, 7, form="JPEG")
                writer.write({"__key__": key, "jpg": image, "txt": meta["caption"], "json": json.dumps(meta, indent=4)})
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"not looked at")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    ours = read_ours(tmp_path, demo.tokenizer, xc_data)
    assert {key: shown(e) for key, e in ours.items()} == {
        f"{s:05d}{i:04d}": f"[{9 + i}x7]red apple {i}" for s in range(2) for i in range(5)
    }


@pytest.mark.parametrize("odd", ["README", "._{name}", "__meta__/{name}", "__shards.json__", "folder.d/.hidden"])
def test_names_that_webdataset_passes_over_split_no_sample_and_are_none(tmp_path, demo, xc_data, odd):
    """Before, between and behind the members of samples, as a tar made on macOS has them: ./._k0.png ./k0.png ./._k0.txt ./k0.txt."""
    pairs = [(f"./{name}", data) for name, data in make_pairs(3)]
    prefix = "./" if odd.startswith(".") else ""
    between = [m for name, data in pairs for m in ((prefix + odd.replace("{name}", name.removeprefix("./")), b"none's"), (name, data))]
    plain, mixed = write_tar(tmp_path / "plain" / "a.tar", pairs), write_tar(tmp_path / "mixed" / "a.tar", [*between, between[0]])
    theirs = [list(webdataset.WebDataset(str(shard), shardshuffle=False)) for shard in (plain, mixed)]
    assert len({json.dumps([(s["__key__"], s["png"].hex(), s["txt"].decode()) for s in samples]) for samples in theirs}) == 1
    ours = read_ours(mixed.parent, demo.tokenizer, xc_data)
    assert ours == read_ours(plain.parent, demo.tokenizer, xc_data)
    assert list(ours) == [s["__key__"] for s in theirs[0]]
    assert not ShardSource("s", mixed.parent).facts.damaged
