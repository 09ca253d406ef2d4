"""A checkpoint is trusted only as long as it is what was written; what has changed since is passed over, by all ranks alike."""

import errno
import os
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pytest
import torch
from one_rank import Alone, Model, make, state, steps

from data_pipeline.errors import TryAgainError
from slurm.job_dir import newest_checkpoint
from train import intact


def test_a_bit_that_flips_in_any_byte_of_any_file_of_a_checkpoint_is_found(run):
    writer = make(run, Model())
    writer.save(state(1))
    writer.wait()
    folder = run.checkpoints / "step-00000001"
    assert intact.problem(folder) is None
    for file in folder.iterdir():
        content = file.read_bytes()
        for place in range(0, len(content), 1 if file.suffix == ".json" else 97):
            flipped = bytearray(content)
            flipped[place] ^= 1
            file.write_bytes(flipped)
            assert intact.problem(folder), (file.name, place, bytes(flipped[place - 9 : place + 9]))
        file.write_bytes(content)
    assert intact.problem(folder) is None


def test_a_damaged_one_takes_the_place_of_none_that_is_written_after_it(run):
    writer = make(run, Model(), keep_last=2)
    for step in (1, 8, 9):
        writer.save(state(step))
    writer.wait()
    for step in (8, 9):
        (run.checkpoints / f"step-0000000{step}" / "weight.pt").write_bytes(b"x")
    assert intact.find(run, Alone(0, 1, 0, None), print) is None
    for step in (2, 3):
        writer.save(state(step))
        writer.wait()
    assert steps(run) == [2, 3] and newest_checkpoint(run) == 3
    assert (run.checkpoints / "latest").read_text() == "step-00000003"


@pytest.fixture
def unreadable(monkeypatch):
    """Makes the disk refuse to read the files of that name."""

    def refuse(name: str) -> None:
        def read_bytes(path: Path, real=Path.read_bytes):
            if path.name == name:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path)

        def digest(path: Path, real=intact.file_digest):
            return real(path) if path.name != name else read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
        monkeypatch.setattr(intact, "file_digest", digest)

    return refuse


@pytest.mark.parametrize("name", ["weight.pt", "state.json", "manifest.json"])
def test_one_that_the_disk_cannot_read_is_waited_for_and_no_older_one_takes_its_place(run, unreadable, name):
    writer = make(run, Model(), keep_last=1)
    for step in (1, 2):
        writer.save(state(step))
    writer.wait()
    unreadable(name)
    for asks in (lambda: intact.find(run, Alone(0, 1, 0, None), print), lambda: intact.newest_good(run)):
        with pytest.raises(TryAgainError, match=rf"step-00000002: {name} cannot be read: Input/output error \(mend .* or move that"):
            asks()
    assert steps(run) == [2], "it may be read again: it keeps its name"


def test_as_long_as_it_is_not_known_which_is_good_none_is_removed(run, unreadable):
    writer = make(run, Model(), keep_last=1)
    writer.save(state(1))
    writer.wait()
    unreadable("state.json")
    for step in (2, 3):
        writer.save(state(step, guard={"in_a_row": step}))
        writer.wait()
    assert steps(run) == [1, 2, 3]


def test_a_state_that_says_something_else_is_not_gone_back_to(run):
    writer = make(run, Model(), keep_last=2)
    for step in (1, 2):
        writer.save(state(step))
    writer.wait()
    file = run.checkpoints / "step-00000002" / "state.json"
    file.write_text(file.read_text().replace('"guard"', '"guarc"'))
    assert intact.newest_good(run).name == "step-00000001"


def test_a_damaged_one_that_cannot_be_renamed_is_said_and_passed_over(run, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    writer = make(run, Model())
    writer.save(state(1))
    writer.wait()
    (run.checkpoints / "step-00000001" / "weight.pt").unlink()
    monkeypatch.setattr(Path, "rename", refuse)
    said = []
    assert intact.find(run, Alone(0, 1, 0, None), said.append) is None
    assert said[0].endswith("is missing (it keeps its name: Directory not empty)")


@dataclass(frozen=True)
class OneOfThree(Alone):
    """A rank that is told by the first one what it asks, in turn, and whose others find this."""

    told: list = field(default_factory=list)
    others: str | None = None

    def share(self, value):
        assert (value is None) == (self.rank != 0), "only the first one looks"
        return self.told.pop(0)

    def gather(self, value):
        return [value, self.others, None]


def test_the_files_of_a_checkpoint_are_dealt_to_the_ranks_to_be_hashed(run, monkeypatch):
    class Large(Model):
        def snapshot(self, folder: Path, tag: str):
            return {folder / tag / f"weight-{i}.pt": torch.zeros(1000 * i) for i in range(1, 6)}

    writer = make(run, Large())
    writer.save(state(1))
    writer.wait()
    folder, digest, hashed = run.checkpoints / "step-00000001", intact.file_digest, []
    monkeypatch.setattr(intact, "file_digest", lambda path: hashed[-1].append(path.name) or digest(path))
    listed = intact._listed(folder)
    for rank in range(3):
        hashed.append([])
        assert intact.find(run, OneOfThree(rank, 3, 0, None, told=[[folder.name], listed]), print) == folder
    assert sorted(chain(*hashed)) == sorted([*(f"weight-{i}.pt" for i in range(1, 6)), "rng-0.pt", "state.json"])
    assert max(map(len, hashed)) == 3
    said = []
    ranks = OneOfThree(0, 3, 0, None, told=[[folder.name], listed], others="weight-4.pt is damaged")
    assert intact.find(run, ranks, said.append) is None
    assert said == ["passed over checkpoint step-00000001: weight-4.pt is damaged (it is damaged-step-00000001 now)"]
