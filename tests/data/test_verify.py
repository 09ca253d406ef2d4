"""`xc-data verify` names every sample that is not what was indexed, reads no more than it was asked to, and says it by its exit code."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tars import cut, make_pairs, overwrite, write_tar
from worker_faults import FailingReads

from data_pipeline.read import storage
from data_pipeline.shards.index import read_index, sidecar_path
from data_pipeline.shards.source import ShardSource
from data_pipeline.shards.verify import verify_shard

PAIRS = 20


@pytest.fixture
def source(tmp_path, demo, xc_data) -> Path:
    """Three shards of 20 pairs."""
    folder = tmp_path / "source"
    for name in "abc":
        write_tar(folder / f"{name}.tar", [(name + n, d) for n, d in make_pairs(PAIRS)])
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


@pytest.fixture
def verify(xc_data, capsys, monkeypatch, source):
    """Runs the command; returns its exit code and {(shard, key): reason}."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*options: object) -> tuple[int, dict[tuple[str, str], str]]:
        capsys.readouterr()
        code = xc_data("verify", source, *options)
        lines = re.findall(r"^(\w\.tar) +(\S+) +\d+\+\d+ +(.*?) *$", capsys.readouterr().out, re.MULTILINE)
        return code, {(shard, key): reason for shard, key, reason in lines}

    return run


def rows(shard: Path) -> list[dict]:
    return read_index(sidecar_path(shard, shard.parent)).table.to_pylist()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_as_indexed_passes_and_each_changed_sample_is_named(source, verify, workers):
    assert verify("--workers", workers) == (0, {})
    for number in (3, 11):
        overwrite(source / "b.tar", rows(source / "b.tar")[number]["members"][1]["offset"], b"R")
    changed = "bytes changed since they were indexed"
    assert verify("--workers", workers) == (70, {("b.tar", "bk3"): changed, ("b.tar", "bk11"): changed})


def test_every_single_bit_counts(source, verify):
    """Headers and padding are a sample's too: what a reader would see is what was indexed, or it is named."""
    row = rows(source / "a.tar")[5]
    whole = (source / "a.tar").read_bytes()
    for at in range(row["offset"], row["offset"] + row["size"], 97):
        overwrite(source / "a.tar", at, bytes([whole[at] ^ 4]))
        assert [m.key for m in verify_shard(0, ShardSource("s", source), 1.0).wrong] == ["ak5"]
        overwrite(source / "a.tar", at, whole[at : at + 1])


def test_shards_that_were_cut_or_are_gone_are_named_sample_by_sample(source, verify):
    cut(source / "a.tar", (source / "a.tar").stat().st_size - 512)
    (source / "c.tar").unlink()
    code, found = verify()
    assert code == 70
    assert found.keys() == {(f"{n}.tar", f"{n}k{i}") for n in "ac" for i in range(PAIRS)}
    assert all(found["a.tar", f"ak{i}"].startswith("shard changed since it was indexed") for i in range(PAIRS))
    assert {found["c.tar", f"ck{i}"] for i in range(PAIRS)} == {"shard is missing"}


def test_what_cannot_be_read_now_is_not_called_changed(source, verify, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", FailingReads())
        code, found = verify()
    assert (code, list(found)) == (75, [(f"{n}.tar", f"{n}k0") for n in "abc"])
    assert all("Connection timed out" in reason for reason in found.values())
    assert verify() == (0, {})


def test_tasks_share_the_shards_out(source, verify):
    for name in "abc":
        overwrite(source / f"{name}.tar", rows(source / f"{name}.tar")[0]["members"][1]["offset"], b"R")
    parts = [verify("--task", f"{i}/2")[1].keys() for i in range(2)]
    assert parts == [{("a.tar", "ak0"), ("c.tar", "ck0")}, {("b.tar", "bk0")}]


def test_a_sample_is_drawn_anew_each_time_and_touches_every_shard(source, verify):
    for name in "abc":
        for row in rows(source / f"{name}.tar"):
            overwrite(source / f"{name}.tar", row["members"][1]["offset"], b"R")
    draws = [verify("--sample", "0.25") for _ in range(6)]
    assert {code for code, _ in draws} == {70}
    for _, found in draws:
        assert [sum(shard == f"{n}.tar" for shard, _ in found) for n in "abc"] == [5, 5, 5]
    assert len({frozenset(found) for _, found in draws}) > 1
    assert len(verify("--sample", "0.0001")[1]) == 3


@pytest.mark.parametrize("share", ["0", "1.5", "-1"])
def test_a_share_that_is_none_is_a_mistake(source, xc_data, capsys, share):
    assert xc_data("verify", source, f"--sample={share}") == 2
    assert "--sample" in capsys.readouterr().err


def test_more_shards_are_verified_than_a_process_may_have_open(tmp_path, demo, xc_data):
    folder, limit = tmp_path / "many", 64
    for i in range(limit + 8):
        write_tar(folder / f"{i:03d}.tar", make_pairs(1))
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    command = [sys.executable, "-m", "data_pipeline.cli", "verify", str(folder)]
    ended = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    )
    assert (ended.returncode, ended.stderr) == (0, "")
