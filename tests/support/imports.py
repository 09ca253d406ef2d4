"""Foreign data in small, as the tools that make them write them, and imports read back by webdataset and by our own index."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from tars import make_image

from data_pipeline.config import DataConfig, ImageConfig, MixUnit, SourceConfig
from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import AnswerEndElement, Element, ImageElement, TextElement, TurnElement
from data_pipeline.shards.source import ShardSource

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "pink", "grey", "brown")
PICTURES = [make_image(8 + i, 6, colour) for i, colour in enumerate(COLOURS)]


def words(elements: Sequence[Element]) -> str:
    """What a person would read: images as [number in PICTURES], turns as |, ends of answers as a full stop."""
    marks = {TextElement: lambda e: e.text, ImageElement: lambda e: f"[{PICTURES.index(e.data)}]", TurnElement: lambda e: "|"}
    return "".join(marks.get(type(e), lambda e: "." if isinstance(e, AnswerEndElement) else "")(e) for e in elements)


def talk(*turns: str) -> list[dict[str, str]]:
    """A conversation that a human begins."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(turns)]


def write_json(path: Path, value: Any) -> Path:
    """A JSON file as `json.dump` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, values: Sequence[Any]) -> Path:
    """JSON lines; a string stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


def write_hugging_face(path: Path, images: Sequence[bytes | None], row_group: int, **columns: Sequence[Any]) -> Path:
    """Parquet as `datasets` writes an Image feature: struct {bytes, path}, and the features in the schema's metadata."""
    cells = [None if image is None else {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({"image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), **columns})
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path, row_group_size=row_group)
    return path


def read_plain(folder: Path) -> dict[str, dict[str, bytes]]:
    """Members by extension of every sample by key, by plain webdataset."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            assert sample["__key__"] not in found, "a key stands once in a source"
            found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


def read_ours(folder: Path, tokenizer: Path, xc_data: Callable[..., int]) -> dict[str, list[Element]]:
    """Elements of every sample by key, by our index; each was also rendered and decoded in the packs of an epoch, none was bad."""
    assert xc_data("index", folder, "--tokenizer", tokenizer) == 0
    assert xc_data("merge", folder) == 0
    config = DataConfig(
        tokenizer=str(tokenizer),
        sources={"imported": SourceConfig(str(folder))},
        unit=MixUnit.epochs,
        context=512,
        global_batch=4,
        images=ImageConfig(size=14, tokens=1),
    )
    data = open_data(config, 0)
    reader = Materialiser(data.sources, data.tokenizer, config.images, 0)
    seen, cursor = [], Cursor(0, 0)
    while (batch := data.plan.global_batch(cursor)).packs:
        packed, bad = reader.batch(batch.packs)
        assert bad == []
        seen += packed.segment_sample.tolist()[:-1]
        cursor = batch.cursor
    source = ShardSource("imported", folder)
    assert sorted(set(seen)) == source.kept(0, source.facts.kept).tolist() == list(range(source.facts.samples)), "none was left out"
    return {key: reader.elements(0, row) for row, key in enumerate(source.keys())}


def left_out(folder: Path) -> list[dict[str, Any]]:
    """What the tasks of an import left out."""
    return [json.loads(line) for file in sorted(folder.glob("import-damaged-*.jsonl")) for line in file.read_text().splitlines()]
