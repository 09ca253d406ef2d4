"""Metrics reach every tracker, each step once; a tracker that fails stops nothing."""

import gzip
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline import jsonl
from train import configure
from train.run_dir import RunDir
from train.tracking.trackers import Trackers, Wandb


def test_wandb_offline_and_tensorboard_get_every_step_of_a_run(whole):
    lines = jsonl.read(whole.run.metrics)
    assert [line["step"] for line in lines] == list(range(1, 25))
    events = EventAccumulator(str(whole.run.tracking / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/train")] == list(range(1, 25))
    assert [e.value for e in events.Scalars("loss/train")] == pytest.approx([line["loss/train"] for line in lines], rel=1e-6)
    assert list(whole.run.tracking.glob("wandb/offline-run-*/*.wandb"))
    assert (whole.run.tracking / "wandb_id").read_text()


def test_losses_by_source_add_up_to_the_loss(whole):
    for line in jsonl.read(whole.run.metrics):
        names = [k.split("/")[1] for k in line if k.startswith("loss_by_source/")]
        tokens = {n: line[f"tokens_by_source/{n}"] for n in names}
        mean = sum(line[f"loss_by_source/{n}"] * tokens[n] for n in names) / sum(tokens.values())
        assert abs(mean - line["loss/train"]) < 1e-9
        assert set(names) <= {"pairs", "documents", "text"}


def test_every_line_says_how_fast_how_full_how_far_and_how_evenly(whole):
    lines = jsonl.read(whole.run.metrics)
    tokens = images = 0
    for line in lines:
        tokens += line["data/fill"] * 4 * 128
        images += line["throughput/images_per_s"] * line["throughput/step_s"]
        assert (line["data/tokens"], line["data/images"]) == pytest.approx((tokens, images))
        parts = sum(line[f"throughput/{part}_s"] for part in ("data", "forward", "backward", "optimizer"))
        assert parts > 0
        assert line["health/forward_max_over_mean"] >= 0.999
        assert 1 <= line["health/image_tokens_max_over_mean"] <= 2
        assert line["health/slowest_rank"] in (0, 1)
        assert 0 < line["health/goodput"] <= 1
        assert line["health/memory_gib"] > 0.1
        assert line["optim/lr_by_rule/.*"] == line["optim/lr"]
        assert line["optim/lr_by_rule/vision"] == pytest.approx(line["optim/lr"] * 0.9)
    assert lines[-1]["data/samples"] > lines[0]["data/samples"] > 0
    assert {name for name in lines[-1] if name.startswith("data/epochs_by_source/")} == {
        f"data/epochs_by_source/{name}" for name in ("pairs", "documents", "text")
    }


def test_the_configured_steps_are_in_a_trace(whole):
    with gzip.open(whole.run.path / "profile" / "steps-5-6.json.gz") as file:
        trace = json.load(file)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::linear" in names


def test_a_tracker_that_cannot_start_or_fails_later_stops_nothing(stage, tmp_path, monkeypatch):
    made = stage(track={"tensorboard": True, "wandb": True})
    run = RunDir(tmp_path / "run")
    run.create()

    def refuse(*arguments: object) -> None:
        raise ConnectionError("no route to the dashboard")

    monkeypatch.setattr(Wandb, "__init__", refuse)
    trackers = Trackers(run, configure.load(made.config), {}, life=1, step=0)
    trackers.log(1, {"loss/train": 1.0})
    for tracker in trackers._others:
        monkeypatch.setattr(tracker, "log", refuse)
    trackers.log(2, {"loss/train": 0.5})
    trackers.log(3, {"loss/train": 0.25})
    trackers.close()
    assert [line["step"] for line in jsonl.read(run.metrics)] == [1, 2, 3]
