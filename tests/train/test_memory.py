"""Memory: flat although every batch has other lengths, as large as was foretold, and tried out before the first step for nothing."""

import json
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from batches import IMAGE_SIZE, IMAGE_TOKENS, batch_of, image, mixed_segments, text, tiny_config, tiny_model
from memory_worker import COURSES, storages
from stages import run_ranks
from train_worker import build

from data_pipeline.errors import UserError
from train import memory
from train.config import Config

GROWTH_MIB = 60
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ZERO = {f"zero {stage} {name}": (stage, name) for stage, name in product(range(4), FORMATS) if stage or name == "fp32"}


def config_of(stage: int) -> Config:
    """Large enough for what DeepSpeed keeps besides weights to matter little."""
    config = Config(model=tiny_config())
    config.model.decoder.hidden, config.model.decoder.ffn, config.model.decoder.vocab = 192, 768, 1000
    config.data.images.size, config.data.images.tokens, config.data.images_per_pack = IMAGE_SIZE, IMAGE_TOKENS, 4
    config.data.context, config.data.global_batch, config.run.seed = 64, 4, 0
    config.deepspeed.stage = stage
    return config


@pytest.fixture(scope="module")
def on_two_ranks(environment, tmp_path_factory) -> dict[str, Any]:
    """Of each stage and format the bytes that a rank holds, what rehearsals hold besides, and the course without and with one; what a batch
    that is too large says.
    """
    folder = tmp_path_factory.mktemp("memory")
    batch = batch_of(mixed_segments())
    jobs = {name: {"config": config_of(stage), "dtype": FORMATS[dtype], "batch": batch} for name, (stage, dtype) in ZERO.items()}
    torch.save(jobs, folder / "jobs.pt")
    worker = str(Path(__file__).parents[1] / "support" / "memory_worker.py")
    command = [sys.executable, worker, str(folder / "jobs.pt"), str(folder / "out.json")]
    run_ranks(command, {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]})
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", ZERO)
def test_weights_gradients_and_optimizer_are_as_large_as_foretold(name: str, on_two_ranks) -> None:
    stage, dtype = ZERO[name]
    config = config_of(stage)
    foretold = memory.states(build(config), config, 2, FORMATS[dtype])
    between_steps = foretold.device - foretold.gathered - foretold.exchange - (0 if stage == 3 else foretold.buffers)
    assert between_steps == pytest.approx(on_two_ranks[name]["bytes"], rel=0.1), foretold


def test_bf16_without_zero_is_refused_since_its_gradients_would_be_summed_in_bf16() -> None:
    with pytest.raises(UserError, match="stage is 0"):
        memory.states(tiny_model(), config_of(0), 2, torch.bfloat16)


@pytest.mark.parametrize("name", sorted(COURSES))
def test_a_rehearsal_of_the_heaviest_batch_leaves_losses_and_weights_as_they_are_bitwise(name: str, on_two_ranks) -> None:
    assert on_two_ranks[name]["plain"] == on_two_ranks[name]["rehearsed"]


@pytest.mark.parametrize("name", ZERO)
def test_a_rehearsal_before_the_first_step_holds_the_room_of_the_moments_that_it_makes(name: str, on_two_ranks) -> None:
    assert on_two_ranks[name]["rooms"] == [1, 0], "after it they are there"


def test_a_batch_that_memory_does_not_hold_ends_in_one_line_with_a_cure(on_two_ranks) -> None:
    said = on_two_ranks["said"]
    assert said.startswith("out of memory on the heaviest pack that the budgets allow (65,552 tokens, 4 images)") and "\n" not in said
    assert "train.checkpointing.kind=full" in said


def test_two_hundred_batches_of_changing_shape_leave_resident_memory_where_it_was():
    model = tiny_model()
    chance = random.Random(0)

    def step() -> None:
        segments = [[image(chance.randrange(99)), text(chance.randint(3, 40), 1)] for _ in range(chance.randint(1, 12))]
        model(batch_of(segments)).loss_sum.backward()
        model.zero_grad()

    for _ in range(60):
        step()
    before, living = psutil.Process().memory_info().rss, len(storages())
    for _ in range(200):
        step()
    assert (psutil.Process().memory_info().rss - before) / 2**20 < GROWTH_MIB
    assert len(storages()) == living, "no tensor of a batch lives on"
