"""The repository's shards are ordinary WebDataset tars: plain `webdataset` reads them without any code of this project."""

import io
import json
from pathlib import Path

import pytest
import webdataset
from PIL import Image

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
