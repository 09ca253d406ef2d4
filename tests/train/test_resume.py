"""Killed and resumed equals never killed, to the last bit; stops are clean; a damaged checkpoint is passed over."""

import random

import pytest
import torch
from safetensors.torch import load_file

from train.run_dir import RunDir
from train.weights.final import MODEL_FILE


def final_weights(run: RunDir) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_file(run.final / MODEL_FILE).items()}


@pytest.mark.parametrize(("workers", "zero", "precision"), [(0, 2, "fp32"), (1, 1, "bf16"), (2, 3, "fp32"), (4, 0, "fp32")])
def test_kill_9_at_a_random_step_then_the_same_command_is_the_uninterrupted_run_bitwise(stage, workers, zero, precision):
    sections = {"data": {"workers": workers}, "deepspeed": {"stage": zero}, "train": {"precision": precision}}
    whole = stage("whole", data={"workers": 0}, deepspeed={"stage": zero}, train={"precision": precision})
    assert whole.train().returncode == 0
    killed = stage("killed", **sections)
    chance = random.Random(f"{workers} {zero}")
    process = killed.start()
    killed.kill_a_rank_after(chance.randint(5, 8), process, chance.randint(0, 1))
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert killed.train().returncode == 0
    assert killed.losses() == whole.losses()
    assert len(killed.losses()) == 10
    assert final_weights(killed.run) == final_weights(whole.run)
    starts = [e["resumed_from"] for e in killed.run.events() if e["event"] == "start"]
    assert starts == [None, 4] or starts == [None, 8]
