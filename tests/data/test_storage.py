"""Shards behind a real web server: indexed and read as if they were local, whatever the server does, and nothing dropped for it."""

import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from demo_data import START, data_config, run, same_step
from tars import cut, overwrite
from web import WebServer

from data_pipeline.config import SourceConfig
from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.opened import open_data
from data_pipeline.read import remote as remote_module
from data_pipeline.read.cache import RangeCache
from data_pipeline.read.remote import Patience, RemotePath
from data_pipeline.read.storage import ShardReader
from data_pipeline.samples import BadSample
from data_pipeline.shards.source import Location, ShardSource

BRISK = Patience(stall=0.5, deadline=8)
SOURCES = ("pairs", "documents", "text")


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., WebServer]]:
    """Starts a server of a folder; all are stopped at the end."""
    servers = []

    def start(root: Path, **faults: object) -> WebServer:
        servers.append(WebServer(root, faults, tmp_path / f"{len(servers)}.requests"))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture
def shards(demo, tmp_path) -> Path:
    """The demo's tars alone, with the list of names that a web server needs."""
    root = tmp_path / "shards"
    for name in SOURCES:
        (root / name).mkdir(parents=True)
        for tar in demo.source(name).glob("*.tar"):
            shutil.copy(tar, root / name)
        (root / name / "shards.txt").write_text("".join(f"{t.name}\n" for t in sorted((root / name).glob("*.tar"))))
    return root


def pairs_of(demo, server: WebServer, patience: Patience = BRISK) -> ShardSource:
    """The demo's pairs behind the server, with the local index."""
    return ShardSource("pairs", f"{server.url}/pairs", demo.source("pairs"), patience=patience)


def local_bytes(demo, row: int) -> bytes:
    return ShardReader().read(ShardSource("pairs", demo.source("pairs")).locate(row))


def remote_config(demo, server: WebServer, **changes: object):
    sources = {name: SourceConfig(f"{server.url}/{name}", str(demo.source(name))) for name in SOURCES}
    return data_config(demo.root, sources=sources, read_stall=0.5, read_deadline=20, **changes)


def merged_digest(xc_data, demo, source: str, index_dir: Path) -> str:
    assert xc_data("index", source, "--tokenizer", demo.tokenizer, "--index-dir", index_dir) == 0
    assert xc_data("merge", source, "--index-dir", index_dir) == 0
    return ShardSource("s", source, index_dir).digest


@pytest.mark.parametrize("where", ["folder", "list of names", "s3"])
def test_a_remote_source_has_the_index_of_a_local_one(demo, shards, serve, xc_data, tmp_path, monkeypatch, where):
    server = serve(shards)
    urls = {"folder": f"{server.url}/pairs/", "list of names": f"{server.url}/pairs/some.txt", "s3": "s3://pairs"}
    if where == "list of names":
        (shards / "pairs" / "shards.txt").rename(shards / "pairs" / "some.txt")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert merged_digest(xc_data, demo, urls[where], tmp_path / "index") == ShardSource("s", demo.source("pairs")).digest
    assert xc_data("stats", urls[where], "--index-dir", tmp_path / "index") == 0
    before = len(server.requests())
    assert xc_data("index", urls[where], "--tokenizer", demo.tokenizer, "--index-dir", tmp_path / "index", "--kind", "pair") == 0
    assert not any(r["range"] for r in server.requests()[before:]), "an index that holds is not made again"
    assert not list(shards.rglob("*.parquet"))


def test_indexing_asks_for_each_byte_once(demo, shards, serve, xc_data, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_CHUNK", 100_000)
    server = serve(shards)
    options = ("--tokenizer", demo.tokenizer, "--index-dir", tmp_path / "index", "--kind", "pair")
    assert xc_data("index", f"{server.url}/pairs", *options) == 0
    asked = [(r["path"], r["range"]) for r in server.requests() if r["range"]]
    assert len(asked) == len(set(asked)) > 3
    spans = [[int(n) for n in span.removeprefix("bytes=").split("-")] for _, span in asked]
    assert sum(last - first + 1 for first, last in spans) == sum(t.stat().st_size for t in (shards / "pairs").glob("*.tar"))


def test_indexing_survives_a_bad_server(demo, shards, serve, xc_data, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_CHUNK", 200_000)
    server = serve(shards, error=5, cut=7)
    digest = merged_digest(xc_data, demo, f"{server.url}/pairs", tmp_path / "index")
    assert digest == ShardSource("s", demo.source("pairs")).digest
    assert {r["fault"] for r in server.requests()} == {None, "error", "cut"}


def test_several_processes_index_a_remote_source(demo, shards, serve, xc_data, tmp_path):
    """Though the one that listed the shards has a client, which no fork could use."""
    url, index = f"{serve(shards).url}/pairs", tmp_path / "index"
    assert xc_data("index", url, "--tokenizer", demo.tokenizer, "--index-dir", index, "--workers", 2) == 0
    assert xc_data("merge", url, "--index-dir", index) == 0
    assert ShardSource("s", url, index).digest == ShardSource("s", demo.source("pairs")).digest


def test_a_truncated_remote_shard_is_damage_in_the_index(demo, shards, serve, xc_data, tmp_path):
    shard = shards / "pairs" / "train-000002.tar"
    cut(shard, shard.stat().st_size // 2)
    url = f"{serve(shards).url}/pairs"
    remote, local = (merged_digest(xc_data, demo, where, tmp_path / str(n)) for n, where in enumerate((url, shards / "pairs")))
    assert remote == local
    assert ShardSource("s", url, tmp_path / "0").facts.damaged["truncated tar"] == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/pairs", "ftp://host/pairs: shards cannot be read there"),
        ("http:///", "shards cannot be read there"),
        ("{url}/nowhere", "shards.txt"),
        ("{url}/pairs/wrong.txt", "'../other/a.tar' is not the name of a file beside it"),
        ("{url}/pairs/empty.txt", "no .tar shard"),
        ("{url}/pairs/twice.txt", "twice.txt line 4: 'a.tar' stands in line 2 already"),
    ],
)
def test_a_url_that_holds_no_source_is_one_line(demo, shards, serve, xc_data, tmp_path, capsys, source, message):
    (shards / "pairs" / "wrong.txt").write_text("a.tar\n../other/a.tar\n")
    (shards / "pairs" / "empty.txt").write_text("\n")
    (shards / "pairs" / "twice.txt").write_text("\na.tar\nb.tar\n a.tar\n")
    where = source.replace("{url}", serve(shards).url)
    assert xc_data("index", where, "--tokenizer", demo.tokenizer, "--index-dir", tmp_path / "index") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_remote_source_needs_a_folder_for_its_index(demo, serve, shards, xc_data, capsys):
    url = f"{serve(shards).url}/pairs"
    for command in (("index", url, "--tokenizer", demo.tokenizer), ("merge", url)):
        assert xc_data(*command) == 2
        assert "--index-dir" in capsys.readouterr().err
    with pytest.raises(UserError, match="index_dir"):
        ShardSource("pairs", url)


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_from_a_web_server_are_those_from_local_shards(demo, serve, shards, workers):
    """With workers: begun by a process without clients, since this one has some."""
    config = remote_config(demo, serve(shards, error=11, cut=13), workers=workers)
    open_data(config, 0).sources[0].locate(0).shard.stat()
    assert remote_module.worker_context().get_start_method() == "forkserver"
    expected, found = run(data_config(demo.root)), run(config)
    for _ in range(2):
        assert same_step(next(expected), next(found))


def test_a_packs_samples_are_asked_for_together(demo, serve, shards):
    server = serve(shards, slow=1)
    source = pairs_of(demo, server, Patience())
    found = ShardReader().read_all([source.locate(row) for row in (*range(12), 3, 3)])
    assert found == [local_bytes(demo, row) for row in (*range(12), 3, 3)]
    assert len(server.requests()) == 12, "a sample that is wanted twice is read once"
    assert max(r["under_way"] for r in server.requests()) > 2


@pytest.mark.parametrize("fault", ["error", "cut", "hang", "rot"])
def test_a_fault_that_passes_is_not_seen(demo, serve, shards, fault):
    last = 1 if fault == "rot" else 3
    server = serve(shards, **{fault: [1, last]})
    assert ShardReader().read(pairs_of(demo, server).locate(7)) == local_bytes(demo, 7)
    faults = [r["fault"] for r in server.requests()]
    assert faults[:last] == [fault] * last
    assert set(faults[last:]) == {None}, "on a busy machine a good answer may come late and be asked for again"


@pytest.mark.parametrize("fault", ["error", "cut", "hang"])
def test_a_fault_that_stays_ends_the_life_and_blames_no_sample(demo, serve, shards, fault):
    server = serve(shards, **{fault: 1})
    source = pairs_of(demo, server, Patience(stall=0.3, deadline=1))
    with pytest.raises(TryAgainError, match=r"http.*/pairs/train-000000.tar: no answer in 1 s") as raised:
        ShardReader().read_all([source.locate(7), source.locate(8)])
    assert "\n" not in str(raised.value)
    assert len(server.requests()) > 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_ends_the_loader_with_try_again(demo, serve, shards, workers):
    server = serve(shards)
    config = replace(remote_config(demo, server, workers=workers), read_stall=0.3, read_deadline=1.0)
    loader = run(config)
    server.kill()
    with pytest.raises(TryAgainError, match="no answer in 1 s"):
        next(loader)


def test_a_server_that_comes_back_is_waited_for(demo, serve, shards):
    server = serve(shards)
    source = pairs_of(demo, server)
    reader = ShardReader()
    assert reader.read(source.locate(0)) == local_bytes(demo, 0)
    server.kill()
    threading.Timer(0.5, server.start).start()
    assert reader.read(source.locate(1)) == local_bytes(demo, 1)


def delete(shard: Path) -> None:
    shard.unlink()


def halve(shard: Path) -> None:
    cut(shard, shard.stat().st_size // 2)


def cut_the_end(shard: Path) -> None:
    cut(shard, shard.stat().st_size - 10)


def append(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(10))


def replace_bytes(shard: Path) -> None:
    overwrite(shard, 0, bytes(shard.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (delete, "shard is missing"),
        (halve, "shard changed since it was indexed"),
        (cut_the_end, "shard changed since it was indexed"),
        (append, "shard changed since it was indexed"),
        (replace_bytes, "bytes changed since they were indexed"),
    ],
)
@pytest.mark.parametrize("at", [0, -1])
def test_a_shard_that_is_another_is_bad_data_and_the_others_are_read(demo, serve, shards, damage, reason, at):
    source = pairs_of(demo, serve(shards))
    first_rows = [*source.facts.shard_first_rows, source.facts.samples]
    damage(shards / "pairs" / "train-000001.tar")
    rows = (0, (first_rows[1:3][at]) + at, first_rows[2])
    before, bad, after = ShardReader().read_all([source.locate(row) for row in rows])
    assert isinstance(bad, BadSample)
    assert str(bad).startswith(reason)
    assert (before, after) == (local_bytes(demo, rows[0]), local_bytes(demo, rows[2]))


@pytest.mark.parametrize(("fault", "message"), [("denied", "access denied"), ("whole", "byte ranges")])
def test_a_server_that_will_never_answer_is_the_users_to_mend(demo, serve, shards, fault, message):
    source = pairs_of(demo, serve(shards, **{fault: 1}), Patience(20, 1))
    with pytest.raises(UserError, match=message) as raised:
        ShardReader().read(source.locate(0))
    assert "\n" not in str(raised.value)


def test_a_fork_of_a_reader_says_that_it_cannot_read(demo, serve, shards):
    """Rather than to wait for threads that it does not have."""
    source = pairs_of(demo, serve(shards))
    ShardReader().read(source.locate(0))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context) as pool, pytest.raises(RuntimeError, match="forked from a reader"):
        pool.submit(read_anew, source).result()


def read_anew(source: ShardSource) -> None:
    ShardReader().read(source.locate(1))


def cached_read(folder: Path, limit: int, source: ShardSource, rows: range) -> list[bytes]:
    reader = ShardReader(RangeCache(folder, limit))
    return [reader.read(source.locate(row)) for row in rows]


def test_what_one_process_read_no_other_asks_for(demo, serve, shards, tmp_path):
    server = serve(shards)
    source = pairs_of(demo, server, Patience())  # whose requests are counted
    expected = [local_bytes(demo, row) for row in range(8)]
    assert cached_read(tmp_path / "cache", 1 << 30, source, range(8)) == expected
    asked = len(server.requests())
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:  # which cannot ask for anything
        assert pool.submit(cached_read, tmp_path / "cache", 1 << 30, source, range(8)).result() == expected
    assert len(server.requests()) == asked == 8


def test_rot_in_the_cache_is_read_again(demo, serve, shards, tmp_path):
    server = serve(shards)
    source = pairs_of(demo, server, Patience())  # whose requests are counted
    cached_read(tmp_path, 1 << 30, source, range(1))
    (kept,) = [f for f in tmp_path.glob("??/*") if not f.name.startswith(".")]
    for damage in (lambda: overwrite(kept, 5, b"zz"), lambda: cut(kept, 9), kept.unlink):
        damage()
        assert cached_read(tmp_path, 1 << 30, source, range(1)) == [local_bytes(demo, 0)]
    assert len(server.requests()) == 4
    assert cached_read(tmp_path, 1 << 30, source, range(1)) == [local_bytes(demo, 0)]
    assert len(server.requests()) == 4


LIMIT = 256 * 6_000


def fill(folder: Path, first: int) -> None:
    """Ranges of 1,000 bytes, of which every process writes its own and some of the others'."""
    cache = RangeCache(folder, LIMIT)
    for number in range(first, first + 1500):
        digest = (number * 0x9E3779B97F4A7C15) % 2**64
        cache.put(digest, digest.to_bytes(8, "little") * 125)
        found = cache.get(digest, 1000)
        assert found is None or found == digest.to_bytes(8, "little") * 125


def test_the_cache_stays_within_its_limit_whoever_writes(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        list(pool.map(fill, [tmp_path] * 3, [0, 800, 2300]))
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    used = sum(f.stat().st_size for f in files)
    assert LIMIT // 2 < used <= LIMIT
    assert not any(f.name.startswith(".") for f in files)


def test_the_cache_keeps_what_was_used_last(tmp_path):
    cache = RangeCache(tmp_path, 256 * 64_000)
    for number in range(400):
        cache.put(number * 256, bytes(1000))  # all in one folder, whose share is 64 of them
        assert cache.get(0, 1000) is not None, f"thrown out after {number} others though always in use"
    assert cache.get(256, 1000) is None


def test_a_cache_that_cannot_be_written_costs_no_sample(demo, serve, shards, tmp_path):
    source = pairs_of(demo, serve(shards))
    cache = RangeCache(tmp_path / "cache", 1 << 30)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file where the folder was")
    assert ShardReader(cache).read(source.locate(0)) == local_bytes(demo, 0)


def test_a_cache_that_cannot_be_made_is_the_users_mistake(demo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        next(run(data_config(demo.root, cache_dir=str(tmp_path / "file" / "cache"))))


def test_neither_place_nor_patience_nor_cache_is_part_of_the_plan(demo, serve, shards, tmp_path):
    config = remote_config(demo, serve(shards), cache_dir=str(tmp_path))
    assert open_data(config, 0).plan.digest == open_data(data_config(demo.root), 0).plan.digest
    assert isinstance(open_data(config, 0).sources[0].locate(0), Location)
    assert isinstance(open_data(config, 0).sources[0].path, RemotePath)
    assert open_data(config, 0).plan.global_batch(START).packs
