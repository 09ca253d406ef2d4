"""Interrupted equals uninterrupted, to the last bit, however it was interrupted; a damaged checkpoint is passed over."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stages import Life, Stage, live_together, make_stage

from data_pipeline import jsonl
from data_pipeline.batch import Segment
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_TRY_AGAIN
from data_pipeline.text.templates import Rendered
from data_pipeline.text.tokenizer import Tokenizer
from train import configure, loop
from train.device import Device
from train.evaluate import BATCH_TOKENS, Scorer
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir
from train.validate import share
from train.weights import final

OTHER_ENGINES = {"zero-0": (0, "fp32"), "zero-1-bf16": (1, "bf16"), "zero-3": (3, "fp32")}


def test_kills_a_signal_a_stop_and_a_save_file_with_other_workers_each_time_leave_the_uninterrupted_run_bitwise(whole, stage):
    chance = random.Random(0)
    broken = stage("broken", data={"workers": 0}, checkpoint={"keep_last": 100})

    first = broken.start()
    broken.kill_a_rank_after(chance.randint(5, 8), first, chance.randint(0, 1))
    first.communicate(timeout=400)
    assert first.returncode == EXIT_CRASH
    assert not broken.rank_pids()
    newest = max(broken.checkpoints(), default=None)

    broken.run.save_file.touch()
    second = broken.start("data.workers=1")
    broken.wait_for(10, second, life=2)
    second.send_signal(signal.SIGTERM)
    _, errors = second.communicate(timeout=400)
    assert second.returncode == EXIT_TRY_AGAIN
    assert "the same command goes on" in errors
    outcome = broken.run.read_outcome()
    assert outcome["code"] == EXIT_TRY_AGAIN
    assert outcome["step"] == broken.checkpoints()[-1]
    assert not broken.run.final.exists()

    third = broken.start("data.workers=2")
    broken.wait_for(outcome["step"] + 2, third, life=3)
    broken.run.stop_file.touch()
    third.communicate(timeout=400)
    assert third.returncode == EXIT_TRY_AGAIN

    for life, after, workers in ((4, outcome["step"] + 4, 4), (5, 20, 0)):
        doomed = broken.start(f"data.workers={workers}")
        broken.wait_for(after, doomed, life)
        time.sleep(chance.uniform(0, 0.1))  # anywhere in a step, or in a checkpoint
        broken.kill_a_rank_after(after, doomed, chance.randint(0, 1), life)
        doomed.communicate(timeout=400)
        assert doomed.returncode == EXIT_CRASH

    assert broken.train().returncode == EXIT_DONE
    assert broken.losses() == whole.losses()
    assert sorted(broken.losses()) == list(range(1, 25))
    assert broken.weights() == whole.weights()
    assert broken.saved(24) == whole.saved(24), "optimizer, random states, data and counts"
    order = [{line["step"]: (line["data/window"], line["data/pack"]) for line in jsonl.read(one.run.metrics)} for one in (broken, whole)]
    assert order[0] == order[1]
    resumed = broken.resumed_from()
    assert resumed[0] is None
    assert resumed[1] == newest
    assert (newest or 0) + 1 in broken.checkpoints(), "as RUN/save asked"
    assert not broken.run.save_file.exists()
    assert resumed[2] == outcome["step"]
    assert resumed[-1] in (16, 20, 24)


@pytest.fixture(scope="module")
def other_engines(demo, environment, tmp_path_factory):
    """By ZeRO stage and number format: an uninterrupted run of 6 steps, validated on its way; and, not validated, its second half."""
    folder = tmp_path_factory.mktemp("engines")
    settings = {
        name: {"deepspeed": {"stage": zero}, "train": {"steps": 6, "precision": precision}, "checkpoint": {"every": 3, "keep_last": 2}}
        for name, (zero, precision) in OTHER_ENGINES.items()
    }
    held_out = {"splits": {"picture": str(demo.source("heldout/unseen_picture/test"))}, "text": str(demo.source("heldout/text"))}
    validated = {"evaluate": {**held_out, "every": 2, "pictures": 45, "captions": 3}}
    wholes = {name: make_stage(demo, environment, folder / name, {**sections, **validated}) for name, sections in settings.items()}
    live_together([Life(whole) for whole in wholes.values()])
    again = {name: make_stage(demo, environment, folder / f"{name}-again", sections) for name, sections in settings.items()}
    for name, one in again.items():
        shutil.copytree(wholes[name].run.path, one.run.path)
        one.forget_after(3)
    live_together([Life(one) for one in again.values()])
    return wholes, again


@pytest.mark.parametrize("name", OTHER_ENGINES)
def test_a_run_that_goes_on_from_a_checkpoint_is_the_uninterrupted_one_bitwise_under_other_engines(other_engines, name):
    wholes, again = (runs[name] for runs in other_engines)
    assert again.resumed_from() == [None, 3]
    replayed = [line for line in jsonl.read(again.run.metrics) if line["life"] == 2]
    assert [line["step"] for line in replayed] == [4, 5, 6]
    assert again.losses() == wholes.losses()
    assert again.weights() == wholes.weights()


@pytest.mark.parametrize("name", OTHER_ENGINES)
def test_losses_measured_on_the_way_are_those_of_the_weights_of_their_step(other_engines, name):
    wholes, _ = other_engines
    one = wholes[name]
    lines = {line["step"]: line for line in jsonl.read(one.run.metrics)}
    assert [step for step, line in lines.items() if "validation/text/nll" in line] == [2, 4, 6]
    config = configure.read_resolved(one.run.path)
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    final.load_into(model, one.run.path)
    scorer = Scorer(model.to(torch.bfloat16 if "bf16" in name else torch.float32).eval(), Tokenizer(config.data.tokenizer), config)
    captions = scorer.captions("picture", Path(config.evaluate.splits["picture"]), 45)
    assert len(captions["right"]) == 40
    measured = {f"picture/nll_{figure}": scorer.score(segments).mean() for figure, segments in captions.items()}
    measured["text/nll"] = scorer.score(scorer.texts(Path(config.evaluate.text))).mean()
    tolerance = 2e-3 if "bf16" in name else 1e-5
    assert {k: lines[6][f"validation/{k}"] for k in measured} == pytest.approx(measured, rel=tolerance)
    sees = lines[6]["validation/picture/nll_wrong"] - lines[6]["validation/picture/nll_right"]
    assert lines[6]["validation/picture/wrong_minus_right"] == sees

    scorer.model = loop.build_model(config, Device(torch.device("cpu"), scorer.model.head.weight.dtype, "")).model.eval()
    base = scorer.score(scorer.texts(Path(config.evaluate.text))).mean()
    for step in (2, 6):
        lost = lines[step]["validation/text/nll"] - lines[step]["validation/text/minus_base"]
        assert lost == pytest.approx(base, rel=tolerance), "text is compared with the weights that the stage began from"


@pytest.mark.parametrize("name", OTHER_ENGINES)
def test_captions_written_on_the_way_are_those_of_the_weights_of_their_step(other_engines, name):
    wholes, _ = other_engines
    one = wholes[name]
    written = jsonl.read(one.run.validation / "captions.jsonl")
    assert [line["step"] for line in written] == [2, 4, 6]
    config = configure.read_resolved(one.run.path)
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    final.load_into(model, one.run.path)
    scorer = Scorer(model.to(torch.bfloat16 if "bf16" in name else torch.float32).eval(), Tokenizer(config.data.tokenizer), config)
    expected = scorer.write("picture", scorer.pictures("picture", Path(config.evaluate.splits["picture"]), 3))
    assert [(c["key"], c["reference"], c["generated"]) for c in written[-1]["captions"]] == [
        (c.key, c.reference, c.generated) for c in expected
    ]
    pictures = json.loads((one.run.validation / "pictures.json").read_text())
    assert set(pictures) == {c.key for c in expected}
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures.values())


@pytest.mark.parametrize(("segments", "world"), [(0, 2), (1, 3), (7, 2), (1000, 3)])
def test_every_rank_gets_as_many_batches_and_every_segment_one_rank(segments, world):
    rendered = Rendered(ids=np.zeros(900, np.int64), supervised=np.ones(900, bool), image_positions=np.zeros(0, np.int64), images=())
    made = [Segment(rendered, (), 0, i) for i in range(segments)]
    shares = [share(made, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in shares}) == 1
    assert [s.sample for batches in shares for batch in batches for s in batch] == list(range(segments))
    assert all(len(batch) * 900 <= BATCH_TOKENS for batches in shares for batch in batches)


def test_only_the_configured_checkpoints_stay(other_engines):
    wholes, _ = other_engines
    assert {tuple(one.checkpoints()) for one in wholes.values()} == {(3, 6)}


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_used(whole, continued):
    damaged = {how: continued(how, 24) for how in ("flip", "missing", "manifest")}
    for how, one in damaged.items():
        newest = one.run.checkpoints / "step-00000024"
        victim = max(newest.glob("*.pt"), key=lambda p: p.stat().st_size)
        if how == "flip":
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        elif how == "missing":
            victim.unlink()
        else:
            (newest / "manifest.json").write_text("{")
    live_together([Life(one) for one in damaged.values()])
    for one in damaged.values():
        assert one.resumed_from() == [None, 20]
        assert "passed over checkpoint step-00000024" in (one.run.logs / "rank-0.log").read_text()
        assert (one.run.checkpoints / "damaged-step-00000024").exists()
        assert one.losses() == whole.losses()
        assert one.weights() == whole.weights()


def test_ranks_end_when_their_launcher_is_killed_and_leave_no_shared_memory(stage):
    orphaned = stage(train={"steps": 1_000_000}, data={"workers": 1})
    process = orphaned.start()
    orphaned.wait_for(2, process)
    pids = orphaned.rank_pids()
    assert len(pids) >= 2
    (port,) = {re.search(rb"MASTER_PORT=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())[1].decode() for pid in pids}
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "of its own: other streams of tests start ranks meanwhile"
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while orphaned.rank_pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphaned.rank_pids()


def test_another_number_of_ranks_or_zero_stage_sees_the_same_samples_and_loses_nothing_but_the_order_of_sums(
    whole, continued, other_engines, tmp_path
):
    """2 ranks, then 1, then 2 again under ZeRO-2, and ZeRO-1 in the end; 2, then 1 under ZeRO-0, and under ZeRO-1 in bf16."""
    wholes, _ = other_engines
    reshaped = {"zero-2": (continued("reshaped", 16), whole)}
    for name in ("zero-0", "zero-1-bf16"):
        one = Stage(tmp_path / f"{name}.yaml", RunDir(tmp_path / name), wholes[name].environment)
        one.config.write_text(wholes[name].config.read_text().replace(f"dir: {wholes[name].run.path}\n", f"dir: {one.run.path}\n"))
        shutil.copytree(wholes[name].run.path, one.run.path)
        one.forget_after(3)
        reshaped[name] = one, wholes[name]
    no_dropout = ("model.plora.dropout=0",)  # whose random numbers belong to a rank
    live_together([Life(one, no_dropout) for one, _ in reshaped.values()], world=1)
    changing = reshaped["zero-2"][0]
    changing.forget_after(20)
    other_stage = continued("other-stage", 16)
    live_together([Life(changing, (*no_dropout, "deepspeed.stage=1")), Life(other_stage, ("deepspeed.stage=1",))])
    reshaped["zero-1"] = other_stage, whole
    assert changing.resumed_from() == [None, 16, 20]
    for name, (one, uninterrupted) in reshaped.items():
        # The uninterrupted runs have dropout in PLoRA, whose products are still next to nothing.
        assert one.losses() == pytest.approx(uninterrupted.losses(), abs=2e-3 if "bf16" in name else 1e-4), name
        tokens = [{line["step"]: line["data/tokens"] for line in jsonl.read(s.run.metrics)} for s in (one, uninterrupted)]
        assert tokens[0] == tokens[1]
        assert not list(one.run.checkpoints.glob(".*partial"))


def test_partitioned_pictures_train_on_two_ranks_as_on_one(stage):
    """4KHD's tiles: images of 2 to 5 tiles, with newlines and separators between their tokens, under ZeRO-2 and, by its gathers, ZeRO-3."""
    tiles = {"size": 32, "tokens": 1, "policy": "partition", "most_tiles": 4, "crop": 0.1}
    settings = {
        "data": {"images": tiles},
        "model": {"projector": {"merge": 2, "marks": True}, "plora": {"rank": 4, "alpha": 4.0, "dropout": 0.0}},
        "train": {"steps": 6},
    }
    stages = {name: stage(name, **settings) for name in ("one", "two", "zero-3")}
    live_together([Life(stages["one"])], world=1)
    live_together([Life(stages["two"]), Life(stages["zero-3"], ("deepspeed.stage=3",))])
    for name in ("two", "zero-3"):
        assert stages[name].losses() == pytest.approx(stages["one"].losses(), abs=1e-4), name
    tiles_seen = [line["data/images"] for line in jsonl.read(stages["one"].run.metrics)]
    assert all(tiles_seen), "every step sees pictures"


def test_a_line_cut_by_a_kill_harms_no_other_line(tmp_path):
    file = tmp_path / "lines.jsonl"
    jsonl.append(file, [{"a": 1}])
    with file.open("a") as cut:
        cut.write('{"a": 2, "b"')
    jsonl.append(file, [{"a": 3}])
    assert jsonl.read(file) == [{"a": 1}, {"a": 3}]
