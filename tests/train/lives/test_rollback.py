"""After too many skipped steps in a row, a run goes back to the last good weights and on behind the bad data, however it is interrupted."""

import json
import shutil

import pytest
import torch
from stages import Life, Stage, live_together, make_stage
from tensors import tensors

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN
from train.report.collect import collect
from train.rollback import WENT_BACK_TO

ENGINES = {"zero-0": (0, "fp32"), "zero-1-bf16": (1, "bf16"), "zero-2": (2, "fp32"), "zero-3": (3, "fp32")}
BAD = {1: [5, 6, 7]}
"""Steps in which a gradient on rank 1 is NaN. Checkpoints are at 2, 4 and 6: the one of 4 is good, that of 6 lies within the row."""


@pytest.fixture(scope="module")
def lived(demo, environment, tmp_path_factory):
    """By engine: the run of 12 steps that went back after step 7; copies that were killed on the way; one that met bad steps again."""
    folder = tmp_path_factory.mktemp("rollback")

    def make(name: str, engine: str) -> Stage:
        zero, precision = ENGINES[engine]
        sections = {"deepspeed": {"stage": zero}, "train": {"steps": 12, "precision": precision}}
        guard, cadence = {"in_a_row": 3, "then": "rollback"}, {"every": 2, "keep_last": 100}
        return make_stage(demo, environment, folder / name, {**sections, "guard": guard, "checkpoint": cadence})

    def copy(of: Stage, name: str) -> Stage:
        made = make(name, "zero-2")
        shutil.copytree(of.run.path, made.run.path)
        return made

    runs = {name: make(name, name) for name in ENGINES}
    live_together([Life(one, nan_gradients=BAD) for one in runs.values()])
    outcomes = {name: one.run.read_outcome() for name, one in runs.items()}
    before, twice = copy(runs["zero-2"], "killed-before"), copy(runs["zero-2"], "twice")
    # As if the kill had come a moment before the rollback was renamed into place.
    (before.run.checkpoints / "step-00000007").rename(before.run.checkpoints / ".step-00000007.partial")
    # ZeRO-3 comes last in a process: DeepSpeed's linear, which it leaves behind, sums in another order.
    live_together([Life(before, nan_gradients={1: [1]}), *map(Life, runs.values())])
    after = copy(runs["zero-2"], "killed-after")
    after.forget_after(7)
    live_together([Life(before), Life(after), Life(twice, nan_gradients={1: [1, 2, 3]})])
    return {"outcomes": outcomes, "runs": runs, "before": before, "after": after, "twice": twice}


def state(one: Stage, step: int) -> dict:
    return json.loads((one.run.checkpoints / f"step-{step:08d}" / "state.json").read_text())


@pytest.mark.parametrize("name", ENGINES)
def test_it_goes_on_from_the_last_good_weights_and_optimizer_behind_the_data_that_was_bad(lived, name):
    outcome, one = lived["outcomes"][name], lived["runs"][name]
    assert (outcome["code"], outcome["step"]) == (EXIT_TRY_AGAIN, 7)
    assert "went back after step 7 to the weights of step 4" in outcome["reason"]
    assert one.run.read_outcome()["code"] == EXIT_DONE
    good, back = (one.run.checkpoints / f"step-{step:08d}" for step in (4, 7))
    files = sorted(file.name for file in good.glob("*.pt"))
    assert files == sorted(file.name for file in back.glob("*.pt"))
    for file in files:
        a, b = (tensors(torch.load(folder / file, weights_only=False)) for folder in (good, back))
        assert a and all(a[place].equal(b[place]) for place in a)

    lines = {line["step"]: line for line in jsonl.read(one.run.metrics)}
    assert len(jsonl.read(one.run.metrics)) == len(lines) == 12, "steps go on counting: no tracker sees one twice"
    assert [lines[step]["data/window"] for step in (7, 8)] == [0, 0]
    assert [lines[8]["data/window"], lines[8]["data/pack"]] == state(one, 7)["cursor"]
    assert lines[8]["data/pack"] == lines[7]["data/pack"] + 4, "it takes up the data where the row ended"
    assert lines[8]["data/tokens"] > lines[7]["data/tokens"]
    assert lines[8]["health/skipped_steps"] == 3
    assert lines[8]["optim/lr"] < lines[7]["optim/lr"], "the schedule moves on"
    assert state(one, 7)["guard"][WENT_BACK_TO] == 4
    assert WENT_BACK_TO not in state(one, 8)["guard"], "a new good checkpoint may be gone back to"


def test_what_was_skipped_is_written_down(lived):
    one = lived["runs"]["zero-2"]
    (line,) = jsonl.read(one.run.path / "skipped" / "rollbacks.jsonl")
    assert (line["step"], line["to"]) == (7, 4)
    lines = {line["step"]: line for line in jsonl.read(one.run.metrics)}
    assert line["first_skipped"] == [lines[5]["data/window"], lines[5]["data/pack"]]
    assert line["next"] == [lines[8]["data/window"], lines[8]["data/pack"]]
    for rank in (0, 1):
        skipped = jsonl.read(one.run.path / "skipped" / f"rank-{rank}.jsonl")
        assert [each["step"] for each in skipped] == [5, 6, 7]
        assert all(each["samples"] for each in skipped)
    lives = [event for event in one.run.events() if event["event"] == "start"]
    assert [(life["resumed_from"], life.get("went_back_to")) for life in lives] == [(None, None), (7, 4)]
    (stage,) = collect(one.run.path)
    kept = [step.values["throughput/step_s"] for step in stage.steps if step.number not in (5, 6, 7)]
    assert stage.kept_seconds == pytest.approx(sum(kept)), "time in steps whose weights were thrown away is not kept"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_before_or_after_the_rollback_changes_nothing(lived, when):
    one, whole = lived[when], lived["runs"]["zero-2"]
    resumed = [None, 6, 7] if when == "before" else [None, 7, 7]
    assert one.resumed_from() == resumed
    assert one.losses() == whole.losses()
    assert one.weights() == whole.weights()
    assert not list(one.run.checkpoints.glob(".*partial"))


def test_a_second_row_before_a_new_good_checkpoint_stops_for_a_person(lived):
    outcome = lived["twice"].run.read_outcome()
    assert (outcome["code"], outcome["step"]) == (EXIT_NEEDS_PERSON, 10)
    assert "the run went back to step 4 already" in outcome["reason"]
    assert lived["twice"].checkpoints()[-1] == 10
