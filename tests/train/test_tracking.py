"""Metrics reach every tracker, each step once; a tracker that fails stops nothing."""

import gzip
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from no_host_sync import no_host_sync
from stages import Life, live_together
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE
from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor
from train import checkpoint, configure
from train.loop import Counts, _lived_s
from train.ranks import Ranks
from train.run_dir import RunDir
from train.tracking.captions import Caption
from train.tracking.figures import Figures
from train.tracking.meter import Meter, Own
from train.tracking.stopwatch import Laps
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
    tokens = images = supervised = image_tokens = 0
    for line in lines:
        supervised += line["throughput/supervised_tokens_per_s"] * line["throughput/step_s"]
        image_tokens += line["throughput/image_tokens_per_s"] * line["throughput/step_s"]
        assert (line["data/supervised_tokens"], line["data/image_tokens"]) == pytest.approx((supervised, image_tokens))
        assert line["data/samples"] == sum(line[f"data/samples_by_source/{name}"] for name in ("pairs", "documents", "text"))
        tokens += line["data/fill"] * 4 * 128
        images += line["throughput/images_per_s"] * line["throughput/step_s"]
        assert (line["data/tokens"], line["data/images"]) == pytest.approx((tokens, images))
        assert all(line[f"throughput/{part}_s"] > 0 for part in ("data", "forward", "backward", "optimizer"))
        assert line["health/forward_max_over_mean"] >= 0.999
        assert 1 <= line["health/image_tokens_max_over_mean"] <= 2
        assert line["health/slowest_rank"] in (0, 1)
        assert 0 < line["health/goodput"] <= 1
        assert line["health/memory_gib"] > 0.1
        assert line["throughput/tflops_per_rank"] > 0
        assert "throughput/mfu" not in line, "nobody knows the peak of a CPU"
        assert line["optim/lr_by_rule/.*"] == line["optim/lr"]
        assert line["optim/lr_by_rule/vision"] == pytest.approx(line["optim/lr"] * 0.9)
    assert lines[-1]["data/samples"] > lines[0]["data/samples"] > 0
    assert {name for name in lines[-1] if name.startswith("data/epochs_by_source/")} == {
        f"data/epochs_by_source/{name}" for name in ("pairs", "documents", "text")
    }


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_utilisation_is_flops_by_time_and_peak_and_no_step_asks_the_device(alone):
    meter = Meter(["pairs", "text"], rank=0, nodes=["here"], peak_flops=1e12)
    for step in (1, 2):
        laps = Laps(
            [("", 0.0), ("data", 1.0), ("forward", 2.0), ("backward", 4.5), ("forward", 5.0), ("backward", 6.0), ("optimizer", 6.25)]
        )
        by_source = [(torch.tensor([6.0, 0.0]), torch.tensor([3, 0])), (torch.tensor([2.0, 9.0]), torch.tensor([1, 2]))]
        own = Own(laps, image_tokens=5, memory=2**31, model_flops=10**12, hardware_flops=2 * 10**12)
        with no_host_sync():
            meter.add(step, by_source, {"throughput/step_s": 5.0}, own)
    (_, first), (number, second) = meter.flush()
    assert (number, second) == (2, first)
    assert (first["throughput/mfu"], first["throughput/hfu"], first["throughput/tflops_per_rank"]) == pytest.approx((0.2, 0.4, 0.2))
    parts = {part: first[f"throughput/{part}_s"] for part in ("data", "forward", "backward", "optimizer")}
    assert parts == {"data": 1.0, "forward": 1.5, "backward": 3.5, "optimizer": 0.25}
    assert (first["loss/train"], first["loss_by_source/pairs"], first["tokens_by_source/text"]) == (17 / 6, 2.0, 2)
    assert (first["health/forward_max_over_mean"], first["health/slowest_rank"], first["health/memory_gib"]) == (1.0, 0, 2.0)
    assert meter.flush() == []


def test_of_several_nodes_each_has_the_mean_of_its_ranks_at_every_flush(alone):
    meter = Meter(["pairs"], rank=2, nodes=["node1", "node2", "node2"], peak_flops=None)
    for step, forward in ((1, 1.0), (2, 3.0)):
        own = Own(Laps([("", 0.0), ("forward", forward)]), image_tokens=5, memory=1, model_flops=1, hardware_flops=1)
        meter.add(step, [(torch.tensor([6.0]), torch.tensor([3]))], {"throughput/step_s": 5.0}, own)
    (_, first), (_, last) = meter.flush()
    by_node = {name: value for name, value in last.items() if name.startswith("health/forward_s_by_node/")}
    assert by_node == {"health/forward_s_by_node/node1": 0.0, "health/forward_s_by_node/node2": 1.0}, "this rank's half; others add theirs"
    assert not first.keys() & by_node.keys()
    assert last["health/slowest_rank"] == 2


def test_tokens_and_images_are_those_of_the_plan_without_padding(whole):
    config = configure.read_resolved(whole.run.path)
    packs = open_data(config.data, config.run.seed, config.train.steps).plan.global_batch(Cursor(0, 0))
    first = jsonl.read(whole.run.metrics)[0]
    assert first["data/tokens"] == (packs.pieces.tokens.astype(int) - ~packs.pieces.last).sum(), "a piece without an end has no end token"
    assert first["data/images"] == packs.pieces.images.sum() > 0


def test_goodput_counts_the_lives_before(whole):
    config = configure.read_resolved(whole.run.path)
    data = open_data(config.data, config.run.seed, config.train.steps)
    state = checkpoint.read_state(max(whole.run.checkpoints.glob("step-*")))
    figures = Figures(config, data, {}, lived_s=1e6)
    line = figures.of_step(Counts(*[1] * len(Counts._fields)), state, 1.0, 0.0, 0.0, 0.0, (0, 0))
    assert line["health/goodput"] == pytest.approx(state.totals["step_ms"] / 1e9, rel=1e-3)


def test_lives_count_from_the_start_of_their_processes_and_without_an_end_until_their_last_step(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    jsonl.append(run.lives, [{"life": life, "event": "start", "time": began} for life, began in ((1, 100.0), (2, 200.0), (3, 300.0))])
    jsonl.append(
        run.metrics, [{"life": life, "step": step, "time": at} for life, step, at in ((1, 1, 110.0), (1, 2, 130.0), (2, 3, 210.0))]
    )
    jsonl.append(run.lives, [{"life": 2, "event": "end", "time": 250.0}])
    assert run.lived_s() == 30 + 50, "the third has not done a step"


def test_no_rank_but_the_first_reads_the_metrics_of_lives_before(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create()
    jsonl.append(run.lives, [{"life": 1, "event": "start", "time": 100.0}])
    run.metrics.mkdir()  # whoever reads it fails
    first, second = (Ranks(rank, 2, None) for rank in range(2))
    assert _lived_s(run, second, began=0.0) == 0.0
    with pytest.raises(IsADirectoryError):
        _lived_s(run, first, began=0.0)


def test_captions_are_a_table_with_pictures_in_wandb_and_in_tensorboard(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = stage(track={"tensorboard": True, "wandb": True})
    run = RunDir(tmp_path / "run")
    run.create()
    said: list[str] = []
    trackers = Trackers(run, configure.load(made.config), {}, life=1, step=0, say=said.append)
    pixels = np.full((3, 8, 8), 200, np.uint8)
    for step, words in ((2, "a | b"), (4, "red apple")):
        trackers.log(step, {"loss/train": 1.0})
        trackers.show(step, [Caption("picture/test", "k1", "food fruit: red apple", words, pixels)])
    trackers.close()

    kept = jsonl.read(run.validation / "captions.jsonl")
    assert [(line["step"], line["captions"][0]["generated"]) for line in kept] == [(2, "a | b"), (4, "red apple")]
    events = EventAccumulator(str(run.tracking / "tensorboard"))
    events.Reload()
    texts = events.Tensors("validation/captions/picture/test/text_summary")
    assert [e.step for e in texts] == [2, 4]
    assert "| k1 | food fruit: red apple | a \\| b |" in texts[0].tensor_proto.string_val[0].decode()
    assert [e.step for e in events.Images("validation/pictures/picture/test/k1")] == [2], "a picture once"
    tables = sorted(run.tracking.glob("wandb/offline-run-*/files/media/table/validation/captions_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["split", "key", "reference", "generated"]
    assert [row[:3] for row in table["data"]] == [["picture/test", "k1", "food fruit: red apple"]]
    assert len(list(run.tracking.glob("wandb/offline-run-*/files/media/images/validation/pictures_*.png"))) == 2


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
    said: list[str] = []
    trackers = Trackers(run, configure.load(made.config), {}, life=1, step=0, say=said.append)
    trackers.log(1, {"loss/train": 1.0})
    for tracker in trackers._others:
        monkeypatch.setattr(tracker, "log", refuse)
    trackers.log(2, {"loss/train": 0.5})
    trackers.log(3, {"loss/train": 0.25})
    trackers.close()
    assert [line["step"] for line in jsonl.read(run.metrics)] == [1, 2, 3]
    cure = "no route to the dashboard (training goes on, metrics.jsonl has every step)"
    assert said == [f"a tracker is off after step 0: {cure}", f"a tracker is off after step 2: {cure}"]


def test_a_wandb_server_that_cannot_be_reached_is_said_in_a_line_and_the_run_is_kept_for_later(stage):
    made = stage(track={"wandb": True}, train={"steps": 3})
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "2"}
    made = replace(made, environment={**made.environment, **nobody})
    done = made.train()
    assert done.returncode == EXIT_DONE, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(("wandb", "a tracker"))]
    assert re.fullmatch(r"wandb cannot be reached: .+ \(this life is kept in .*, for wandb sync\)", line)
    assert list(made.losses()) == history(made.run) == [1, 2, 3]


def leveldb_log(content: bytes, first: int, block: int = 32768) -> Iterator[bytes]:
    """The records of wandb's file behind its header of `first` bytes: pieces of (crc 4, length 2, kind 1), none across a block's border."""
    place, whole = 0, b""
    while place + 7 <= len(content):
        left = block - (place + first) % block
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def history(run: RunDir) -> list[int]:
    """The steps that wandb's offline files of all lives hold, in the order in which they would be sent."""
    steps = []
    for file in sorted(run.tracking.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, leveldb_log(file.read_bytes()[7:], first=7)):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            steps += [int(items["_step"])] if "_step" in items else []
            assert items.get("_step") == items.get("step")
    return steps


def test_a_run_that_was_stopped_twice_is_one_run_with_each_step_once_in_every_dashboard(stage):
    """As after kills: steps are done again that were shown already."""
    made = stage(track={"every": 2, "tensorboard": True, "wandb": True}, train={"steps": 8}, checkpoint={"every": 2, "keep_last": 9})
    for step in (4, 6, None):
        live_together([Life(made)])
        if step:
            made.forget_after(step)
    assert made.resumed_from() == [None, 4, 6]
    every = list(range(1, 9))
    assert [line["step"] for line in jsonl.read(made.run.metrics)] == [*every, 5, 6, 7, 8, 7, 8]
    events = EventAccumulator(str(made.run.tracking / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/train")] == every
    assert history(made.run) == every
    assert len({file.stem.rpartition("-")[2] for file in made.run.tracking.glob("wandb/offline-run-*/*.wandb")}) == 1, "one run"
