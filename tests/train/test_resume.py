"""Killed and resumed equals never killed, to the last bit; stops are clean; a damaged checkpoint is passed over."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_TRY_AGAIN, EXIT_USER
from train.run_dir import RunDir
from train.weights.final import MODEL_FILE


def final_weights(run: RunDir) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(run.final / MODEL_FILE).items()}


def resumed_from(run: RunDir) -> list[int | None]:
    return [event["resumed_from"] for event in run.events() if event["event"] == "start"]


@pytest.mark.parametrize(("workers", "zero", "precision"), [(0, 2, "fp32"), (1, 1, "bf16"), (2, 3, "fp32"), (4, 0, "fp32")])
def test_kill_9_at_a_random_step_then_the_same_command_is_the_uninterrupted_run_bitwise(stage, workers, zero, precision):
    same = {"deepspeed": {"stage": zero}, "train": {"precision": precision}}
    whole = stage("whole", data={"workers": 0}, **same)
    assert whole.train().returncode == EXIT_DONE
    killed = stage("killed", data={"workers": workers}, **same)
    chance = random.Random(f"{workers} {zero}")
    process = killed.start()
    killed.kill_a_rank_after(chance.randint(5, 8), process, chance.randint(0, 1))
    process.communicate(timeout=60)
    assert process.returncode == EXIT_CRASH
    assert not killed.rank_pids()
    assert killed.train().returncode == EXIT_DONE
    assert killed.losses() == whole.losses()
    assert sorted(killed.losses()) == list(range(1, 11))
    assert final_weights(killed.run) == final_weights(whole.run)
    assert resumed_from(killed.run) in ([None, 4], [None, 8])


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_request_ends_after_the_step_with_a_checkpoint_and_the_same_command_goes_on(stage, how):
    stopped = stage(train={"steps": 400}, checkpoint={"every": 1000})
    process = stopped.start()
    while 3 not in stopped.losses():
        assert process.poll() is None
        time.sleep(0.02)
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    else:
        stopped.run.stop_file.touch()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_TRY_AGAIN
    assert "the same command goes on" in errors
    outcome = stopped.run.read_outcome()
    assert outcome["code"] == EXIT_TRY_AGAIN
    assert (stopped.run.checkpoints / f"step-{outcome['step']:08d}" / "manifest.json").exists()
    assert not stopped.run.stop_file.exists() or how == "file"
    assert not (stopped.run.final).exists()


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(stage, damage):
    damaged = stage(train={"steps": 8})
    assert damaged.train().returncode == EXIT_DONE
    before, weights = damaged.losses(), final_weights(damaged.run)
    newest = damaged.run.checkpoints / "step-00000008"
    victim = max(newest.glob("*.pt"), key=lambda p: p.stat().st_size)
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    (damaged.run.final / "manifest.json").unlink()  # as if killed before the end
    assert damaged.train().returncode == EXIT_DONE
    assert resumed_from(damaged.run) == [None, 4]
    assert "passed over checkpoint step-00000008" in (damaged.run.logs / "rank-0.log").read_text()
    assert damaged.losses() == before
    assert final_weights(damaged.run) == weights


def test_a_finished_run_is_passed_over_and_only_the_configured_checkpoints_stay(stage):
    finished = stage(train={"steps": 6}, checkpoint={"every": 1, "keep_last": 2})
    assert finished.train().returncode == EXIT_DONE
    assert sorted(p.name for p in finished.run.checkpoints.glob("step-*")) == ["step-00000005", "step-00000006"]
    again = finished.train()
    assert again.returncode == EXIT_DONE
    assert "finished before" in again.stdout
    assert finished.run.life() == 1


def test_ranks_end_when_their_launcher_is_killed_and_leave_no_shared_memory(stage):
    shared = set(Path("/dev/shm").glob("deepspeed_*"))
    orphaned = stage(train={"steps": 1_000_000}, data={"workers": 1})
    process = orphaned.start()
    while 2 not in orphaned.losses():
        assert process.poll() is None
        time.sleep(0.02)
    assert len(orphaned.rank_pids()) >= 2
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while orphaned.rank_pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphaned.rank_pids()


def test_another_number_of_ranks_is_refused_in_one_line_that_names_the_cure(stage):
    two = stage(train={"steps": 300}, checkpoint={"every": 2})
    process = two.start()
    two.kill_a_rank_after(3, process, 1)
    process.communicate(timeout=60)
    one = two.train(procs=1)
    assert one.returncode == EXIT_USER
    assert "--procs" in one.stderr
    assert len(one.stderr.strip().splitlines()) == 1
    assert list(two.run.checkpoints.glob("step-*"))


def test_a_line_cut_by_a_kill_harms_no_other_line(tmp_path):
    file = tmp_path / "lines.jsonl"
    jsonl.append(file, [{"a": 1}])
    with file.open("a") as cut:
        cut.write('{"a": 2, "b"')
    jsonl.append(file, [{"a": 3}])
    assert jsonl.read(file) == [{"a": 1}, {"a": 3}]
