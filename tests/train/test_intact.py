"""A checkpoint is trusted only as long as it is what was written; what has changed since is passed over, by all ranks alike."""

import errno
import os
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from one_rank import Alone, Model, make, state, steps

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


def test_one_that_the_disk_cannot_read_is_passed_over(run, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    writer = make(run, Model())
    writer.save(state(1))
    writer.wait()
    monkeypatch.setattr(intact, "file_digest", fail)
    said = []
    assert intact.find(run, Alone(0, 1, 0, None), said.append) is None
    assert len(said) == 1 and said[0].endswith("cannot be read: Input/output error")
    assert steps(run) == [1], "it may be read again: it keeps its name"


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
