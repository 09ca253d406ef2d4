"""Everything goes wrong at once, on a real web server: the loader finishes, what is lost is named, nothing else is lost or repeated."""

import io
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo_data import data_config, read_rank
from PIL import Image
from tars import cut, write_tar
from web import WebServer

from data_pipeline.config import DataConfig, ImageConfig, SourceConfig
from data_pipeline.shards.index import read_index, sidecar_path
from data_pipeline.shards.source import ShardSource

SHARDS, PAIRS, PAGES = 4, 40, 20
RANKS = 2

Lost = dict[tuple[str, str, str], str]
"""(source, shard, key) of each sample that a fault takes, and how its reason begins."""


def picture(seed: int, form: str) -> bytes:
    """Noise, so that the file is large enough to be damaged in its pixels."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)).save(out, form)
    return out.getvalue()


def damaged(data: bytes) -> bytes:
    """The header is whole, so that the index takes it."""
    return data[:300] + b"\xff" * 40 + data[340:] if data.startswith(b"\x89PNG") else data[: len(data) // 2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, demo, xc_data) -> tuple[Path, Path, Lost]:
    """Shards without and with damage, and what the damage takes: 1 % of the images, and one shard cut after it was indexed."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    lost: Lost = {}
    for number in range(SHARDS):
        members: dict[Path, list[tuple[str, bytes]]] = {whole: [], broken: []}
        for i in range(PAIRS):
            key, form = f"{number}-{i}", ("png", "jpg")[i % 2]
            data = picture(number * PAIRS + i, "PNG" if form == "png" else "JPEG")
            bad = i == 17 and number != 2
            if bad:
                lost["pairs", f"{number}.tar", key] = "image does not decode"
            for root, found in members.items():
                found += [(f"{key}.{form}", damaged(data) if bad and root == broken else data), (f"{key}.txt", f"thing {i}".encode())]
        for root, found in members.items():
            write_tar(root / "pairs" / f"{number}.tar", found)
    pages = []
    for i in range(PAGES):
        page = {"texts": [f"page {i} begins", None, "goes on", None], "images": [None, "0.jpg", None, "1.png"]}
        images = [(f"page-{i}.0.jpg", picture(1000 + i, "JPEG")), (f"page-{i}.1.png", picture(2000 + i, "PNG"))]
        pages += [(f"page-{i}.json", json.dumps(page).encode()), *images]
    for root in (whole, broken):
        write_tar(root / "pages" / "0.tar", pages)
        for name in ("pairs", "pages"):
            assert xc_data("index", root / name, "--tokenizer", demo.tokenizer) == 0
            assert xc_data("merge", root / name) == 0
    shard = broken / "pairs" / "2.tar"
    table = read_index(sidecar_path(shard, shard.parent)).table
    lost |= {("pairs", "2.tar", key): "shard changed since it was indexed" for key in table["key"].to_pylist()}
    cut(shard, shard.stat().st_size // 2)
    return whole, broken, lost


def config(demo, root: Path, url: str | None = None, **changes: object) -> DataConfig:
    """An epoch of the pairs and the pages."""
    named = {n: SourceConfig(f"{url}/{n}" if url else str(root / n), str(root / n)) for n in ("pairs", "pages")}
    settings = {"context": 64, "global_batch": 4, "window": 300, "images": ImageConfig(size=32, tokens=4), **changes}
    return data_config(demo.root, sources=named, read_stall=1.0, read_deadline=60.0, **settings)


@pytest.fixture
def server(sources, tmp_path) -> Iterator[WebServer]:
    with WebServer(sources[1], {"error": 11, "cut": 13, "hang": 41, "rot": 29}, tmp_path / "requests") as server:
        yield server


def crash_for_five_seconds(server: WebServer, after: int, readers: list[Future]) -> None:
    """Once `after` requests were answered; the readers must still have something to ask when it comes back."""
    while len(server.requests()) < after:
        assert not any(reader.done() for reader in readers), [reader.exception() for reader in readers]
        time.sleep(0.05)
    server.kill()
    time.sleep(5)
    asked = len(server.requests())
    server.start()
    while len(server.requests()) == asked:
        assert not all(reader.done() for reader in readers), "the run was over before the server came back"
        time.sleep(0.05)


def test_only_what_is_damaged_is_lost_and_the_ledger_names_it(demo, sources, server):
    whole, broken, lost = sources
    remote = config(demo, broken, server.url, workers=2, prefetch=1)
    fresh = multiprocessing.get_context("spawn")
    # ranks are fresh processes, which fork their workers
    with ProcessPoolExecutor(RANKS, fresh, initializer=multiprocessing.set_start_method, initargs=("fork", True)) as pool:
        readers = [pool.submit(read_rank, remote, rank, RANKS) for rank in range(RANKS)]
        crash_for_five_seconds(server, 60, readers)
        ranks = [reader.result() for reader in readers]
    assert {"error", "cut", "hang", "rot"} <= {r["fault"] for r in server.requests()}

    names = {0: "pairs", 1: "pages"}
    opened = {number: ShardSource(name, broken / name) for number, name in names.items()}
    keys = {(number, row): key for number, source in opened.items() for row, key in enumerate(source.keys())}
    lost_rows = {(number, row) for (number, row), key in keys.items() if any((names[number], key) == (s, k) for s, _, k in lost)}
    assert len(lost_rows) == len(lost) > PAIRS

    planned = read_rank(config(demo, broken), 0, 1)
    expected = expected_segments(demo, whole)
    assert {len(rank) for rank in ranks} == {len(planned)}, "all ranks make the same steps"
    found = Counter(segment for rank in ranks for step, _ in rank for segment in step)
    assert found == Counter({s: n for s, n in expected.items() if s[:2] not in lost_rows})

    entries = [entry for rank in ranks for _, bad in rank for entry in bad]
    named = Counter((entry.source, entry.shard, entry.key) for entry in entries)
    assert named == Counter(dict.fromkeys(lost, 1))
    assert all(entry.reason.startswith(lost[entry.source, entry.shard, entry.key]) for entry in entries)
    for together in zip(planned, *ranks, strict=True):
        alone, *parts = (Counter(segment for segment in step) for step, _ in together)
        assert sum(parts, Counter()) == alone, "each step holds what it holds without a network"


def expected_segments(demo, whole: Path) -> Counter:
    """All segments of the epoch, from shards that are whole."""
    return Counter(segment for step, _ in read_rank(config(demo, whole), 0, 1) for segment in step)
