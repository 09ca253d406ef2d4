"""Checkpoints are written in the background, one at a time, each of its own moment; what cannot be written harms none before it."""

import errno
import fcntl
import gc
import hashlib
import os
import shutil
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from one_rank import Alone, Model, make, state, steps

from data_pipeline.errors import UserError
from train import checkpoint, intact, reshape
from train.checkpoint import Writer
from train.config import CheckpointConfig
from train.engine import _copied, _Snapshots
from train.rollback import roll_back


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits for the event that this returns."""
    go, save = threading.Event(), torch.save

    def slow(*arguments):
        assert go.wait(timeout=30)
        save(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    return go


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(run, slow_disk):
    model = Model()
    writer = make(run, model)
    writer.save(state(1))  # returns although nothing is written
    model.weight += 1
    assert steps(run) == []
    second = threading.Thread(target=writer.save, args=(state(2),))
    second.start()
    second.join(timeout=0.3)
    assert second.is_alive(), "the next one waits for the one before"
    slow_disk.set()
    second.join(timeout=30)
    writer.wait()
    assert steps(run) == [1, 2]
    first, then = (torch.load(run.checkpoints / f"step-0000000{step}" / "weight.pt") for step in (1, 2))
    assert first.tolist() == [0, 0, 0]
    assert then.tolist() == [1, 1, 1]


def test_a_checkpoint_that_is_not_finished_is_invisible_and_swept_away(run, slow_disk):
    writer = make(run, Model())
    writer.save(state(1))
    slow_disk.set()
    writer.save(state(2))
    writer.wait()
    slow_disk.clear()
    writer.save(state(3))  # never finished, as by a kill
    said = []
    (run.checkpoints / "step-00000002" / "state.json").unlink()
    found = intact.find(run, Alone(0, 1, 0, None), said.append)
    assert found.name == "step-00000001"
    renamed = "(it is damaged-step-00000002 now)"
    assert said == [f"passed over checkpoint step-00000002: state.json is missing {renamed}"], "the user is told"
    assert not list(run.checkpoints.glob(".*partial"))
    slow_disk.set()


def test_the_last_ones_stay_and_every_so_many_for_good(run):
    writer = make(run, Model(), keep_last=2, keep_every=4)
    for step in range(1, 12):
        writer.save(state(step))
    writer.wait()
    assert steps(run) == [4, 8, 10, 11]


def test_the_newest_one_before_a_row_of_skipped_steps_stays(run):
    writer = make(run, Model(), keep_last=2)
    for step, in_a_row in enumerate([0, 0, 0, 1, 2, 3], start=1):
        writer.save(state(step, guard={"in_a_row": in_a_row}))
    writer.wait()
    assert steps(run) == [3, 5, 6]


def test_one_that_was_written_before_the_first_step_can_be_gone_back_to(run):
    writer = make(run, Model())
    writer.save(state(0))
    writer.wait()
    assert roll_back(run, Alone(0, 1, 0, None), state(3), CheckpointConfig()) == 0
    assert steps(run) == [0, 3]


def test_a_write_that_fails_is_told_at_the_next_step_and_harms_no_other(run, monkeypatch):
    writer = make(run, Model())
    writer.save(state(1))
    writer.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    writer.save(state(2))
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step-00000002: No space left on device \(free space"):
        writer.wait()
    with pytest.raises(UserError):
        writer.check()
    assert steps(run) == [1]
    assert not list(run.checkpoints.glob(".*partial"))


@dataclass(frozen=True)
class BesideAnother(Alone):
    """A rank beside one that says that it wrote these files."""

    written: checkpoint.Written = field(default_factory=dict)

    def gather(self, value):
        return [value, (None, self.written)]


class ModelBesideAnother(Model):
    """The other rank's file has two bytes."""

    def snapshot(self, folder: Path, tag: str):
        (folder / tag / "other.pt").write_bytes(b"12")
        return super().snapshot(folder, tag)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ({"other.pt": (2, hashlib.sha256(b"12").hexdigest())}, None),
        ({"other.pt": (3, "")}, "other.pt has 2 bytes, of 3"),
        ({"gone.pt": (2, "")}, "gone.pt was written by a rank and"),
    ],
)
def test_a_checkpoint_that_lacks_what_another_rank_wrote_is_not_made_visible(run, written, why):
    before = make(run, Model())
    before.save(state(1))
    before.wait()
    writer = Writer(run, ModelBesideAnother(), BesideAnother(0, 2, 0, None, written=written), CheckpointConfig())
    writer.save(state(2))
    with pytest.raises(UserError, match=f"cannot write checkpoint .*step-00000002: {why}") if why else nullcontext():
        writer.wait()
    assert steps(run) == ([1] if why else [1, 2])
    assert why or intact.problem(run.checkpoints / "step-00000002") is None


@dataclass(frozen=True)
class BesideOneThatFails(Alone):
    """A rank beside one that could not write, for this reason."""

    why: str = ""

    def gather(self, value):
        return [value, (self.why, {})]


@pytest.mark.parametrize("theirs", ["cannot write: Disk quota exceeded", f"{checkpoint._CRASH}step-1: FileNotFoundError"])
def test_of_two_ranks_that_fail_the_one_that_the_file_system_refused_is_told(run, monkeypatch, theirs):
    there = []

    def fails(*_: object) -> None:
        there.append(list(run.checkpoints.glob(".*partial")))
        raise RuntimeError("Parent directory does not exist") if "quota" in theirs else OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(torch, "save", fails)
    writer = Writer(run, Model(), BesideOneThatFails(0, 2, 0, None, why=theirs), CheckpointConfig())
    writer.save(state(1))
    with pytest.raises(UserError, match="Disk quota exceeded"):
        writer.wait()
    assert there[0] and not list(run.checkpoints.glob(".*partial"))


@pytest.mark.parametrize("late", ["short", "sync"])
def test_a_file_of_which_the_disk_has_less_than_was_written_makes_no_checkpoint(run, monkeypatch, late):
    writer = make(run, Model())
    save = torch.save

    def short(content, out):
        save(content, out)
        out.flush()
        os.truncate(out._file.name, out.size - 100)

    def refused(descriptor: int) -> None:  # to the one who wrote: who only reads the file is told nothing
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(torch, "save", short) if late == "short" else monkeypatch.setattr(os, "fsync", refused)
    writer.save(state(1))
    with pytest.raises(UserError, match="bytes, of" if late == "short" else "Disk quota exceeded"):
        writer.wait()
    assert steps(run) == []


def test_an_old_checkpoint_that_cannot_be_removed_harms_no_new_one(run, monkeypatch):
    writer = make(run, Model(), keep_last=1)
    writer.save(state(1))
    writer.wait()
    rmtree = shutil.rmtree

    def held_open(path, ignore_errors=False):
        if "00000001" in str(path) and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        if "00000001" not in str(path):
            rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", held_open)
    writer.save(state(2))
    writer.wait()
    assert steps(run) == [2]
    assert intact.find(run, Alone(0, 1, 0, None), print).name == "step-00000002"


def mapped(file: Path) -> bool:
    """Whether this process has it in its address space."""
    gc.collect()
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("optimizer", ["optimizer", "optimizer_state_dict"])
def test_weights_are_read_from_a_mapped_file_and_the_optimizer_keeps_none_of_it(tmp_path, optimizer):
    file, many = tmp_path / "model.pt", torch.arange(10_000.0)
    torch.save({"module": {"weight": many}, optimizer: {"state": {0: {"exp_avg": many + 1}}}, "step": 3}, file)
    found = _Snapshots().load(str(file), map_location="cpu")
    weight, moment = found["module"].pop("weight"), found[optimizer]["state"][0]["exp_avg"]
    assert mapped(file), "else each rank of a node would hold all weights once more"
    assert torch.equal(weight, many) and torch.equal(moment, many + 1) and found["step"] == 3
    del weight
    assert not mapped(file), "it may be removed while training runs"
    assert torch.equal(moment, many + 1)


def test_a_copy_has_the_containers_and_numbers_of_what_it_is_a_copy_of_and_none_of_its_memory():
    inner = torch.nn.Parameter(torch.ones(2))
    value = {"a": [inner, (inner, 3)], "b": {"c": inner[:1]}, "d": "text", "e": None}
    found = _copied(value)
    with torch.no_grad():
        inner.zero_()
    assert found["a"][0].tolist() == found["a"][1][0].tolist() == [1, 1]
    assert found["b"]["c"].tolist() == [1]
    assert (found["d"], found["e"], found["a"][1][1], type(found["a"][1])) == ("text", None, 3, tuple)


def test_a_copy_that_is_being_made_is_measured_whatever_comes_and_goes(tmp_path):
    (tmp_path / "stays").write_bytes(b"12345")
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            for number in range(9):
                (tmp_path / "tmp" / str(number)).mkdir(parents=True)
                (tmp_path / "tmp" / str(number) / "file").write_bytes(b"1")
            shutil.rmtree(tmp_path / "tmp")

    worker = threading.Thread(target=work)
    worker.start()
    sizes = {reshape._bytes(tmp_path) for _ in range(1500)}
    done.set()
    worker.join()
    assert min(sizes) == 5 and max(sizes) > 5, "something did come and go"


def test_what_cannot_be_gone_on_with_is_refused_with_the_way_out(run):
    folder = run.checkpoints / "step-00000001"
    for then, now, cure in [
        ({"world": 2, "zero_stage": 0, "dtype": "torch.bfloat16"}, {"zero_stage": 0, "dtype": "torch.bfloat16"}, "--procs 2, not 1"),
        ({"world": 2, "zero_stage": 3}, {"world": 1, "zero_stage": 3}, "--procs 2, not 1"),
        ({"zero_stage": 3}, {"zero_stage": 2}, "deepspeed.stage 3, not 2"),
        ({"zero_stage": 0}, {"zero_stage": 1}, "deepspeed.stage 0, not 1"),
        ({"dtype": "torch.bfloat16"}, {"dtype": "torch.float32"}, "train.precision bf16, not fp32: use the same"),
        ({"plan_digest": "a"}, {"plan_digest": "b"}, "data.change"),
        ({"base_digest": "a"}, {"base_digest": "b"}, "init_from"),
    ]:
        with pytest.raises(UserError, match=cure):
            checkpoint.require_same(state(1, **then), state(1, **now), folder)
    checkpoint.require_same(state(1, world=2, zero_stage=1), state(1, world=1), folder)
    whole = {"zero_stage": 0, "dtype": "torch.float32"}
    checkpoint.require_same(state(1, world=2, **whole), state(1, world=1, **whole), folder)
