"""Bad data never stops or desynchronises a run, and the ledger names each sample that was left out."""

import io
import json
import shutil
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
import webdataset
from PIL import Image
from stages import Life, live_together
from web import WebServer

from data_pipeline import jsonl
from data_pipeline.config import ErrorConfig
from data_pipeline.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN
from data_pipeline.opened import open_data
from data_pipeline.plan.origin import Cursor
from data_pipeline.read.budget import overdrawn
from data_pipeline.read.ledger import read_ledger
from train import configure


def webp(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (color, 90, 200 - color)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def bad_source(tmp_path, demo, xc_data):
    folder = tmp_path / "bad"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        for i in range(60):
            tar.write({"__key__": f"good-{i}", "webp": webp(i), "txt": f"food fruit: red apple {i}".encode()})
        noise = io.BytesIO()
        Image.effect_noise((64, 64), 90).convert("RGB").save(noise, "PNG")
        broken = bytearray(noise.getvalue())
        broken[200:-100] = b"\xff" * (len(broken) - 300)
        tar.write({"__key__": "corrupt-image", "png": bytes(broken), "txt": b"a picture that does not decode"})
        tar.write({"__key__": "not-utf8", "webp": webp(1), "txt": b"caf\xe9 \xff"})
        tar.write({"__key__": "good-7", "webp": webp(2), "txt": b"a key for the second time"})
    with webdataset.TarWriter(str(folder / "b.tar")) as tar:
        for i in range(30):
            tar.write({"__key__": f"cut-{i}", "webp": webp(i + 60), "txt": b"animal bird: parrot"})
    content = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(content[: len(content) // 2])
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


@pytest.fixture
def bad_documents(tmp_path, demo, xc_data):
    folder = tmp_path / "documents"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "d.tar")) as tar:
        for i in range(20):
            page = {"texts": ["see this figure", None, "and read on"], "images": [None, "0.webp", None]}
            tar.write({"__key__": f"page-{i}", "json": json.dumps(page).encode(), "0.webp": webp(i)})
        tar.write({"__key__": "empty-page", "json": b'{"texts": [], "images": []}'})
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


@pytest.fixture
def rotten_source(tmp_path, demo, xc_data):
    """Every fourth picture does not decode, which its header does not tell."""
    folder = tmp_path / "rotten"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        for i in range(200):
            picture = webp(i)
            tar.write({"__key__": f"k{i}", "webp": picture if i % 4 else picture[:40] + b"\xff" * 40, "txt": b"animal bird: parrot"})
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


@pytest.fixture
def runs(stage, demo, bad_source, bad_documents, rotten_source):
    """A run over bad data, and one whose source is over its budget, which is then raised; on one pair of ranks."""
    sources = {"bad": {"path": str(bad_source), "weight": 2}, "documents": {"path": str(bad_documents), "weight": 2}}
    bad = stage("bad-run", data={"sources": sources, "unit": "epochs"}, train={"steps": None})
    sources = {"rotten": {"path": str(rotten_source)}, "text": {"path": str(demo.source("text"))}}
    over = stage("over", data={"sources": sources}, train={"steps": 8})
    errors = "data.sources.rotten.errors"
    live_together([Life(bad), Life(over, (f"{errors}.share=0.1", f"{errors}.segments=100"))])
    return bad, over


def test_bad_samples_are_dropped_and_named_and_a_source_over_its_budget_stops_all_ranks_at_one_step(runs):
    bad, over = runs
    assert bad.run.read_outcome()["code"] == EXIT_DONE
    named = {(e["source"], e["key"]): e["reason"] for e in read_ledger(bad.run.path)}
    assert "does not decode" in named["bad", "corrupt-image"]
    assert "not UTF-8" in named["bad", "not-utf8"]
    assert "duplicate key" in named["bad", "good-7"]
    assert "empty document" in named["documents", "empty-page"]
    assert any(e["shard"] == "b.tar" and "tar" in e["reason"] for e in read_ledger(bad.run.path))
    assert not any(key.startswith("page-") for _, key in named)
    assert jsonl.read(bad.run.metrics)[-1]["health/bad_samples"] == 2  # the corrupt image, once an epoch

    errors = "data.sources.rotten.errors"
    outcome = over.run.read_outcome()
    assert outcome["code"] == EXIT_NEEDS_PERSON
    assert f"source rotten could not be used, more than {errors}.share = 0.1 of 100" in outcome["reason"]
    assert "xc-data ledger" in outcome["reason"]
    step = outcome["step"]
    assert 0 < step < 8
    assert f"stopped after step {step}" in outcome["reason"]
    dropped = [e for e in read_ledger(over.run.path) if "step" in e]
    assert len(dropped) > 10
    assert max(e["step"] for e in dropped) == step - 1, "the step that was one too many is in the ledger"
    assert sum(e["step"] < step - 1 for e in dropped) <= 10, "and it is the first that was"
    state = json.loads((over.run.checkpoints / f"step-{step:08d}" / "state.json").read_text())
    assert state["totals"]["source/rotten/dropped"] == state["totals"]["dropped"] == len(dropped)
    assert state["totals"]["source/text/dropped"] == 0

    counts = {"rotten": ErrorConfig(share=0.1, segments=100)}
    assert overdrawn(state["totals"], counts), "so that the same command would stop at once"
    over.run.outcome.unlink()
    assert over.train(f"{errors}.share=1").returncode == EXIT_DONE, "a budget may be raised"
    assert sorted(over.losses()) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def many_shards(tmp_path, demo, xc_data):
    """Two texts a shard."""
    folder = tmp_path / "many"
    folder.mkdir()
    for shard in range(20):
        with webdataset.TarWriter(str(folder / f"{shard:02}.tar")) as tar:
            for i in range(2):
                tar.write({"__key__": f"{shard}-{i}", "txt": f"food fruit: red apple {shard} {i}".encode()})
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


def test_a_run_that_has_done_its_steps_needs_no_data_behind_them(stage, many_shards):
    sections = {"data": {"sources": {"many": {"path": str(many_shards)}}, "segments_per_pack": 1, "global_batch": 2}, "train": {"steps": 2}}
    made = stage(**sections)
    config, cursor, needed = configure.load(made.config), Cursor(0, 0), []
    data = open_data(config.data, config.run.seed, config.train.steps)
    for _ in range(3):
        batch = data.plan.global_batch(cursor)
        needed.append({data.sources[0].facts.shards[data.sources[0].shard_of(row)] for row in batch.pieces.row.tolist()})
        cursor = batch.cursor
    unread = {path.name for path in many_shards.glob("*.tar")} - needed[0] - needed[1]
    assert needed[2] & unread, "else the step behind the last would find its data"
    for name in unread:  # a file system that fails, which may pass
        (many_shards / name).unlink()
        (many_shards / name).symlink_to(name)
    live_together([Life(made)])
    assert made.run.read_outcome()["code"] == EXIT_DONE
    assert sorted(made.losses()) == [1, 2]

    made.forget_after(2)  # as if the kill had come before the weights were written
    for name in needed[0] | needed[1]:
        (many_shards / name).unlink()
        (many_shards / name).symlink_to(name)
    live_together([Life(made)])
    assert (made.run.read_outcome()["code"], made.resumed_from()) == (EXIT_DONE, [None, 2])
    assert made.weights()


def test_a_server_that_goes_away_ends_the_life_with_try_again_and_the_same_command_goes_on(stage, demo, tmp_path):
    shutil.copytree(demo.root, tmp_path / "served")
    with WebServer(tmp_path / "served", {"error": 17, "cut": 23}) as server:
        sources = {name: {"path": f"{server.url}/{name}", "index_dir": str(demo.source(name))} for name in ("pairs", "documents", "text")}
        run = stage(data={"sources": sources, "read_deadline": 8, "read_stall": 2}, train={"steps": 10})
        life = run.start()
        while 3 not in run.losses():
            assert life.poll() is None, life.communicate()
            time.sleep(0.02)
        server.kill()
        _, err = life.communicate(timeout=400)
        assert life.returncode == EXIT_TRY_AGAIN, err
        assert "no answer in 8 s" in err
        server.start()
        done = run.train()
        assert done.returncode == EXIT_DONE, done.stderr
    assert sorted(run.losses()) == list(range(1, 11))
    assert read_ledger(run.run.path) == [], "no sample is dropped for a network"


def kill_the_worker_that_holds(mib: int, process: subprocess.Popen[str]) -> None:
    """What the kernel does where memory runs out: SIGKILL to the data worker that takes this much."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.parent().pid != process.pid and child.memory_full_info().uss > mib * 2**20:
                    child.kill()
                    return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.soak  # the short form, with real workers but no ranks, is tests/data/test_killers.py
def test_a_picture_that_costs_its_worker_the_life_is_left_out_by_the_same_command(stage, tmp_path, demo, xc_data):
    folder, huge = tmp_path / "huge", io.BytesIO()
    folder.mkdir()
    Image.new("RGBA", (8000, 8000)).save(huge, "PNG", compress_level=1)  # 256 MB, held twice and more
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        for i in range(40):
            tar.write({"__key__": f"good-{i}", "webp": webp(i), "txt": f"food fruit: red apple {i}".encode()})
        tar.write({"__key__": "huge", "png": huge.getvalue(), "txt": b"a picture that takes all memory"})
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    made = stage(data={"sources": {"huge": {"path": str(folder)}}, "unit": "epochs", "workers": 1}, train={"steps": None})
    first = made.start(procs=1)
    kill_the_worker_that_holds(450, first)
    said = first.communicate(timeout=400)[1]
    assert first.returncode == EXIT_TRY_AGAIN
    assert "huge in a.tar of source huge killed the worker that read it (SIGKILL); the same command goes on without it" in said
    second = made.train(procs=1)
    assert second.returncode == EXIT_DONE, second.stderr
    assert [(e["key"], e["reason"]) for e in read_ledger(made.run.path)] == [("huge", "killed the worker that read it (SIGKILL)")]
