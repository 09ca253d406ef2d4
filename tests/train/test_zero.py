"""ZeRO 0, 1, 2, 3 on two real ranks and one process without DeepSpeed are the same training.

On the demo's real data, with uneven numbers of supervised tokens, ranks that never see an image, and empty packs.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stages import run_ranks, stage_settings
from train_worker import build, optimizer_of

from data_pipeline.batch import PackedBatch
from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.materialise import Materialiser
from train import configure
from train.config import Config
from train.objective import scaled_loss
from train.optim import set_lr

STAGES = (0, 1, 2, 3)
DATA = ("mixed", "lopsided", "one-a-rank", "four-a-rank")
STEPS = {"adamw": 10, "sgd": 5}
LR = {"adamw": 1e-3, "sgd": 0.5}


def read_packs(config: Config, count: int) -> list[PackedBatch]:
    """The first packs of the plan, each a micro-batch."""
    data = open_data(config.data, config.run.seed)
    reader = Materialiser(data.sources, data.tokenizer, config.data.images, config.run.seed)
    packs, cursor = [], Cursor(0, 0)
    while len(packs) < count:
        global_batch = data.plan.global_batch(cursor)
        packs += [reader.batch([pack])[0] for pack in global_batch.packs]
        cursor = global_batch.cursor
    return packs[:count]


@pytest.fixture(scope="module")
def jobs(demo, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """A job a ZeRO stage and optimizer: two packs a rank and step; the same, rank 1 with text and empty packs only; one pack; four."""
    folder = tmp_path_factory.mktemp("zero")
    settings = stage_settings(demo, folder / "run")
    settings["model"]["plora"]["dropout"] = 0.0
    settings["data"]["sources"] = {name: settings["data"]["sources"][name] for name in ("pairs", "documents")}
    text = {**settings, "data": {**settings["data"], "sources": {"text": {"path": str(demo.source("text"))}}}}
    configs = []
    for name, content in (("mixed", settings), ("text", text)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        configs.append(configure.load(folder / f"{name}.yaml"))
    mixed, text_only = read_packs(configs[0], 40), read_packs(configs[1], 20)
    empty = Materialiser([], open_data(configs[1].data, 0).tokenizer, configs[1].data.images, 0).batch([])[0]
    steps = {
        "mixed": [mixed[i : i + 4] for i in range(0, 40, 4)],
        "lopsided": [[mixed[i], text_only[i], mixed[i + 1], empty] for i in range(10)],
        "one-a-rank": [mixed[i : i + 2] for i in range(0, 20, 2)],
        "four-a-rank": [[*mixed[i : i + 4], *mixed[i + 20 : i + 24]] for i in range(0, 20, 2)],
    }
    assert tuple(steps) == DATA
    found = {}
    for data, optimizer, stage in [(d, o, s) for d in steps for o in STEPS for s in STAGES if o == "sgd" or d in DATA[:2]]:
        batch = replace(configs[0].data, global_batch=len(steps[data][0]))
        config = replace(configs[0], data=batch, deepspeed=replace(configs[0].deepspeed, stage=stage))
        found[f"{data}-{optimizer}-{stage}"] = {
            "config": config,
            "optimizer": optimizer,
            "lr": LR[optimizer],
            "steps": steps[data][: STEPS[optimizer]],
        }
    return found


def on_two_ranks(environment: dict[str, str], name: str, *arguments: Path) -> None:
    """Runs a script of tests/support to its end."""
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / name), *map(str, arguments)]
    run_ranks(command, {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]})


@pytest.fixture(scope="module")
def under_deepspeed(jobs, environment, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """All jobs, on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(jobs, folder / "jobs.pt")
    on_two_ranks(environment, "train_worker.py", folder / "jobs.pt", folder / "out.pt")
    return torch.load(folder / "out.pt", weights_only=True)


def in_one_process(job: dict[str, Any]) -> dict[str, Any]:
    """The reference: every pack of a step in one process, torch alone."""
    model = build(job["config"])
    optimizer = optimizer_of(model, job["optimizer"])
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for packs in job["steps"]:
        n_global = sum(p.supervised for p in packs)
        total = 0.0
        for batch in packs:
            loss_sum = model(batch).loss_sum
            scaled_loss(loss_sum, 1, n_global).backward()
            total += loss_sum.item()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, job["config"].train.grad_clip).item())
        set_lr(optimizer, job["lr"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / max(1, n_global))
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("data", ["mixed", "lopsided"])
def test_losses_over_ten_adamw_steps_are_those_of_one_process(jobs, under_deepspeed, data, stage):
    name = f"{data}-adamw-{stage}"
    assert under_deepspeed[name]["losses"] == pytest.approx(in_one_process(jobs[name])["losses"], abs=1e-5, rel=0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("data", DATA)
def test_parameters_after_five_sgd_steps_and_the_gradients_on_the_way_are_those_of_one_process(jobs, under_deepspeed, data, stage):
    name = f"{data}-sgd-{stage}"
    found, expected = under_deepspeed[name], in_one_process(jobs[name])
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5, rel=0)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), "torch sums them in fp32, 3e-5 off; ZeRO 1 and 2 do not"
    reference, fresh = expected["weights"], dict(build(jobs[name]["config"]).named_parameters())
    moved = 0.0
    for parameter, value in found["weights"].items():
        assert (value - reference[parameter]).abs().max() <= 1e-6, parameter
        moved = max(moved, (value - fresh[parameter]).abs().max().item())
    assert moved > 1e-3  # else equality would say nothing


def test_gradients_of_bf16_weights_are_summed_over_ranks_in_fp32_unless_extra_says_otherwise(environment, tmp_path):
    on_two_ranks(environment, "sums_worker.py", tmp_path / "out.json")
    for job, masters in json.loads((tmp_path / "out.json").read_text()).items():
        assert set(masters) == {-1.0 if job.endswith("bf16") else -1.0 - 2.0**-9}, job


def test_supervised_tokens_differ_between_ranks_or_equal_weighting_would_pass_too(jobs):
    for packs in jobs["mixed-sgd-2"]["steps"]:
        assert len({p.supervised for p in packs}) > 1
