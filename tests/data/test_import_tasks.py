"""Imports as job arrays: tasks never write one name, together they are one process, and what was killed is done anew to the same end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from imports import left_out, read_ours, read_plain, write_hugging_face, write_json, write_lines
from tars import make_image

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.shards import write
from data_pipeline.shards.write import Limits, Refused, Sample, require_whole, write_task

ABOUT = {"layout": "test", "source": "nowhere"}


def made(first: int, last: int) -> list[Sample | Refused]:
    """Samples with a bad one after every fourth."""
    found: list[Sample | Refused] = []
    for i in range(first, last):
        found.append(Sample(f"k{i:03d}", {"txt": f"text {i}".encode(), "png": make_image(8 + i % 5)}))
        if i % 4 == 3:
            found.append(Refused("a.json", i, f"image not found: {i}.png"))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


@pytest.fixture
def source(tmp_path) -> Path:
    """43 records of JSON lines, some bad, and their pictures."""
    (tmp_path / "in").mkdir()
    for i in range(43):
        (tmp_path / "in" / f"{i}.png").write_bytes(make_image(8 + i, 6))
    lines = [{"image": f"{i}.png" if i % 10 else "none.png", "caption": f"red apple {i}"} for i in range(43)]
    return write_lines(tmp_path / "in" / "a.jsonl", lines)


@pytest.mark.parametrize(("limits", "shards"), [(Limits(samples=7), 6), (Limits(bytes=20_000), 4), (Limits(), 1)])
def test_shards_are_bounded_and_the_same_bytes_every_time(tmp_path, limits, shards):
    report, _ = write_task(tmp_path / "a", ABOUT, 3, 4, made(0, 40), limits)
    assert list(report.shards) == [f"part-00003-{i:06d}.tar" for i in range(len(report.shards))]
    assert len(report.shards) >= shards
    assert all(len(read_plain_shard(tmp_path / "a" / name)) <= limits.samples for name in report.shards)
    write_task(tmp_path / "b", ABOUT, 3, 4, made(0, 40), limits)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def read_plain_shard(shard: Path) -> list[str]:
    import webdataset

    return [s["__key__"] for s in webdataset.WebDataset(str(shard), shardshuffle=False)]


@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("layout", ["jsonl", "list", "parquet"])
def test_an_array_of_tasks_is_one_process(tmp_path, xc_data, source, layout, tasks):
    if layout == "list":
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        source = write_json(source.with_suffix(".json"), lines)
    if layout == "parquet":
        for part in range(3):
            images = [make_image(8 + i) if i % 10 else None for i in range(15 * part, 15 * part + 15)]
            write_hugging_face(tmp_path / "in" / f"{part}.parquet", images, 4, caption=[f"red {i}" for i in range(15)])
        source = tmp_path / "in"
    name = "parquet" if layout == "parquet" else "jsonl"
    assert xc_data("import", name, source, tmp_path / "one") == 0
    for task in reversed(range(tasks)):
        assert xc_data("import", name, source, tmp_path / "array", "--task", f"{task}/{tasks}") == 0
    assert read_plain(tmp_path / "array") == read_plain(tmp_path / "one")
    assert sorted(map(str, left_out(tmp_path / "array"))) == sorted(map(str, left_out(tmp_path / "one")))
    assert left_out(tmp_path / "one")


def test_tasks_never_write_the_same_name(tmp_path):
    for task in range(3):
        write_task(tmp_path / str(task), ABOUT, task, 3, made(10 * task, 10 * task + 10), Limits(samples=3))
    names = [name for task in range(3) for name in content(tmp_path / str(task))]
    assert sorted(n for n in names if names.count(n) > 1) == ["import.json"] * 3
    assert len({(tmp_path / str(task) / "import.json").read_bytes() for task in range(3)}) == 1, "which says the same"


def test_a_finished_task_is_passed_over_and_one_that_lost_a_shard_is_not(tmp_path):
    _, new = write_task(tmp_path, ABOUT, 0, 1, made(0, 20), Limits(samples=5))
    whole = content(tmp_path)
    assert new

    def untouched():
        raise AssertionError("a finished task reads nothing")
        yield

    report, new = write_task(tmp_path, ABOUT, 0, 1, untouched())
    assert (report.samples, new) == (20, False)
    (tmp_path / "part-00000-000002.tar").unlink()
    with pytest.raises(UserError, match="1 of 1 import tasks are not done"):
        require_whole(tmp_path)
    _, new = write_task(tmp_path, ABOUT, 0, 1, made(0, 20), Limits(samples=5))
    assert new
    assert content(tmp_path) == whole


def write_until(end: int, folder: Path) -> int:
    """Writes task 0 of 2, and kills this process at the given call that the writer makes or gets; returns how many there are."""
    calls = 0

    def count(frame, event, _) -> None:
        nonlocal calls
        near = (frame, frame.f_back) if event == "call" else (frame,) if event == "c_call" else ()
        if any(f is not None and f.f_code.co_filename == write.__file__ for f in near):
            calls += 1
            if calls == end:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        write_task(folder, ABOUT, 0, 2, made(0, 20), Limits(samples=5))
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("share", [0, 0.2, 0.6, 0.8, 0.84, 0.87, 0.9, 0.94, 0.98])
def test_an_import_killed_anywhere_shows_nothing_half_and_is_whole_when_run_again(tmp_path, share):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write_task(cut, ABOUT, 1, 2, made(20, 30), Limits(samples=5))
    end = 1 + int(share * write_until(0, whole))
    process = multiprocessing.get_context("fork").Process(target=write_until, args=(end, cut))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen, expected = content(cut), content(whole)
    assert all(seen[name] == expected[name] for name in seen.keys() & expected.keys()), "what shows is whole"
    if "import-done-00000.json" not in seen:
        with pytest.raises(UserError, match="are not done, first 0"):
            require_whole(cut)
    write_task(cut, ABOUT, 0, 2, made(0, 20), Limits(samples=5))
    require_whole(cut)
    again = content(cut)
    assert {name: again[name] for name in expected} == expected
    assert sorted(read_plain(cut)) == [f"k{i:03d}" for i in range(30)]
    assert not [f for f in cut.iterdir() if f.name.startswith(".") and not f.name.startswith(".part-00000")]


def test_a_command_killed_in_its_work_is_whole_when_run_again(tmp_path, demo, xc_data, source):
    """The whole command, by SIGKILL, once its first shard has begun."""
    source.write_text(source.read_text() * 30)
    command = [sys.executable, "-m", "data_pipeline.cli", "import", "jsonl", str(source), str(tmp_path / "shards")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list((tmp_path / "shards" / ".part-00000").glob("*.tar")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "shards").glob("*.tar")) == []
    assert xc_data("import", "jsonl", source, tmp_path / "shards") == 0
    assert len(read_ours(tmp_path / "shards", demo.tokenizer, xc_data)) == (43 - 5) * 30


def test_a_task_at_work_elsewhere_is_not_done_twice(tmp_path):
    program = f"""
import fcntl, sys
from pathlib import Path
path = Path({str(tmp_path)!r}) / ".part-00000" / "lock"
path.parent.mkdir()
file = path.open("ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TryAgainError, match=r"task 0 of .* is being imported by another process"):
            write_task(tmp_path, ABOUT, 0, 1, made(0, 5))
        other.stdin.close()
    write_task(tmp_path, ABOUT, 0, 1, made(0, 5))
    assert len(read_plain(tmp_path)) == 5


def test_two_imports_do_not_mix_in_a_folder(tmp_path, xc_data, source, capsys):
    assert xc_data("import", "jsonl", source, tmp_path / "shards", "--task", "0/2") == 0
    assert xc_data("import", "jsonl", source, tmp_path / "shards", "--task", "0/3") == 2
    assert "holds an import with another value of tasks: 2, not 3" in capsys.readouterr().err
    source.write_text(source.read_text() + "{}\n")
    assert xc_data("import", "jsonl", source, tmp_path / "shards", "--task", "1/2") == 2
    assert "another value of files" in capsys.readouterr().err


def test_a_merge_of_half_an_import_is_refused(tmp_path, demo, xc_data, source, capsys):
    for task in (0, 2):
        assert xc_data("import", "jsonl", source, tmp_path / "shards", "--task", f"{task}/3") == 0
    assert xc_data("index", tmp_path / "shards", "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", tmp_path / "shards") == 2
    assert "1 of 3 import tasks are not done, first 1 (run: xc-data import jsonl ... --task 1/3)" in capsys.readouterr().err
    assert xc_data("import", "jsonl", source, tmp_path / "shards", "--task", "1/3") == 0
    assert len(read_ours(tmp_path / "shards", demo.tokenizer, xc_data)) == 43 - 5


def test_a_full_disk_is_a_mistake_that_leaves_nothing(tmp_path, monkeypatch):
    def full(self, sample):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write.ShardWriter, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device \(free space"):
        write_task(tmp_path, ABOUT, 0, 1, made(0, 5))
    assert list(tmp_path.iterdir()) == []
