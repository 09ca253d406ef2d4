"""A step that cannot be trusted moves nothing, on any rank, is counted and written down, and too many in a row stop the run."""

import json
import math

import pytest
import torch
from demo_data import SEED, START, data_config, run_world
from no_host_sync import no_host_sync
from stages import Life, live_together, make_stage
from tensors import tensors

from data_pipeline import jsonl
from data_pipeline.config import MixUnit
from data_pipeline.errors import EXIT_NEEDS_PERSON
from data_pipeline.opened import open_data
from train import configure
from train.config import GuardConfig
from train.guard import Guard, Window, judge

ZERO = ("0-fp32", "1-bf16", "2-fp32", "3-fp32")


def judged(losses, sigma, size=8):
    """Which of the losses are believed."""
    window, verdicts = Window.empty(size, torch.device("cpu")), []
    for loss in losses:
        with no_host_sync():
            ok, window = judge(window, torch.tensor(loss, dtype=torch.float64), sigma)
        verdicts.append(bool(ok))
    return verdicts


def test_a_loss_far_above_a_full_window_is_a_spike_and_never_becomes_the_rule():
    level = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0, 3.1, 2.9]
    assert judged([9.0, *level], 4.0)[0], "without a full window nothing is a spike"
    assert judged([*level, 3.2, 9.0, 9.0, 9.0, 3.0], 4.0)[8:] == [True, False, False, False, True]
    assert all(judged([*level, 9.0, 0.1], 0.0)), "0 lets spikes through"
    assert judged([*level, 0.1], 4.0)[-1], "a low loss is no spike"


def test_a_loss_that_is_not_finite_is_never_believed_and_leaves_no_trace():
    assert judged([3.0, math.nan, math.inf, 3.0] * 4, 4.0) == [True, False, False, True] * 4


@pytest.fixture(scope="module")
def poisoned(demo, environment, tmp_path_factory):
    """By engine: 6 steps in which one gradient on rank 1 is NaN in steps 3 and 4; and a run in which every rise of the loss is a spike."""
    folder = tmp_path_factory.mktemp("guard")
    made = {}
    for name in ZERO:
        zero, precision = name.split("-")
        train, cadence = {"steps": 6, "precision": precision}, {"every": 2, "keep_last": 3}
        sections = {"deepspeed": {"stage": int(zero)}, "train": train, "checkpoint": cadence}
        made[name] = make_stage(demo, environment, folder / name, sections)
    guard = {"sigma": 0.01, "window": 3, "in_a_row": 0}
    spikes = make_stage(demo, environment, folder / "spikes", {"guard": guard, "train": {"steps": 12, "lr": 0.3}})
    live_together([*(Life(one, nan_gradients={1: [3, 4]}) for one in made.values()), Life(spikes)])
    return {**made, "spikes": spikes}


@pytest.mark.parametrize("name", ZERO)
def test_a_nan_in_the_gradient_of_one_rank_skips_the_step_on_all_and_the_run_goes_on(poisoned, name):
    one = poisoned[name]
    lines = {line["step"]: line for line in jsonl.read(one.run.metrics)}
    assert [lines[step]["health/skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    assert all(math.isfinite(line["loss/train"]) for line in lines.values())
    assert "skipped 2" in one.said()
    state = json.loads((one.run.checkpoints / "step-00000004" / "state.json").read_text())
    assert state["guard"]["in_a_row"] == 2
    for file in one.run.checkpoints.glob("step-00000002/*states.pt"):
        before, after = (tensors(torch.load(f, weights_only=False)) for f in (file, one.run.checkpoints / "step-00000004" / file.name))
        assert len(before) > 3
        assert all(before[place].equal(after[place]) for place in before), "neither weights nor optimizer moved"
    for rank in (0, 1):
        skipped = jsonl.read(one.run.path / "skipped" / f"rank-{rank}.jsonl")
        assert [line["step"] for line in skipped] == [3, 4]
        for line in skipped:
            assert "gradient" in line["reason"]
            assert (line["window"], line["pack"]) == (lines[line["step"]]["data/window"], lines[line["step"]]["data/pack"])
            assert {sample["source"] for sample in line["samples"]} <= {"pairs", "documents", "text"}
            assert all(sample["key"] and sample["shard"].endswith(".tar") for sample in line["samples"])
            assert line["samples"]


def test_a_spike_skips_its_step_on_all_ranks_and_is_kept_out_of_the_window(poisoned):
    one = poisoned["spikes"]
    lines = jsonl.read(one.run.metrics)
    told = [jsonl.read(one.run.path / "skipped" / f"rank-{rank}.jsonl") for rank in (0, 1)]
    assert [line["step"] for line in told[0]] == [line["step"] for line in told[1]]
    assert len(told[0]) == lines[-1]["health/skipped_steps"] > 0
    assert all("the loss spiked to" in line["reason"] for line in told[0])
    state = json.loads((one.run.checkpoints / "step-00000012" / "state.json").read_text())
    spiked = {line["step"] for line in told[0]}
    believed = [line["loss/train"] for line in lines if line["step"] not in spiked]
    assert sorted(state["guard"]["losses"]) == pytest.approx(sorted(believed[-3:]), rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_batch_by_which_a_step_is_judged_has_a_target_where_any_has(demo, tmp_path, ranks):
    """Also of the last steps of a plan, whose last places are empty on all ranks."""
    config = data_config(demo.root, unit=MixUnit.epochs, global_batch=12)
    guard = Guard(GuardConfig(), tmp_path, 0, torch.device("cpu"), {})
    empty = 0
    for parts in run_world(config, open_data(config, SEED), ranks, START, 0):
        for step in parts:
            batches = guard.judged_last(step)
            assert sorted(map(id, batches)) == sorted(id(m.batch) for m in step.micro_batches)
            assert batches[-1].supervised or not any(batch.supervised for batch in batches)
            empty += batches[-1].supervised > 0 == step.micro_batches[-1].batch.supervised
    assert empty, "there are such steps"


def test_a_run_that_diverges_goes_back_once_without_being_asked_then_stops_for_a_person_and_goes_on_counting(stage):
    """The first step throws the weights away, so that all others are skipped; its checkpoint is the last good one."""
    one = stage(train={"lr": 1e30}, guard={"in_a_row": 3, "then": "rollback"}, checkpoint={"every": 1})
    stopped = one.train()
    assert stopped.returncode == EXIT_NEEDS_PERSON, stopped.stderr
    back, stop = stopped.stderr.strip().splitlines()
    assert "went back after step 4 to the weights of step 1" in back
    assert "3 steps in a row moved nothing" in stop
    assert "the run went back to step 1 already" in stop
    assert "skipped" in stop
    assert one.resumed_from() == [None, 4]
    step = one.run.read_outcome()["step"]
    assert one.checkpoints()[-1] == step == 7
    live_together([Life(one)])
    outcome = one.run.read_outcome()
    assert (outcome["code"], outcome["step"]) == (EXIT_NEEDS_PERSON, step + 1), "it was not forgotten that three were skipped"
    assert "4 steps in a row" in outcome["reason"]


def test_the_guard_shapes_no_result_until_it_acts(stage):
    config = stage().config
    assert configure.shaping_difference(configure.load(config), configure.load(config, ["guard.sigma=6"])) is None
