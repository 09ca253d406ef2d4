"""Packs whose tokens are shared out over ranks are the same training: losses, gradients, counts, checkpoints.

Four real ranks run parts of hand-made batches as one group of four and as two groups of two; two real ranks train on the demo's shards.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import IMAGE_SIZE, IMAGE_TOKENS, batch_of, image, mixed_segments, text
from sequence_worker import build, gradients, measure
from stages import Life, Stage, live_together, make_stage, run_ranks

from data_pipeline import jsonl
from data_pipeline.batch import PackedBatch
from data_pipeline.errors import EXIT_TRY_AGAIN, EXIT_USER, UserError
from data_pipeline.inspect.history import find_step
from data_pipeline.part import fingerprint, part_of
from slurm.config import SlurmConfig
from slurm.submit import wasteful
from train import configure, memory
from train.cli import main
from train.config import Checkpointing, Config, Recompute
from train.flops import Shape
from train.outlook import Machine, look, page
from train.ranks import SequenceGroup
from train.rehearsal import heaviest_batch

WORLD = 4
GROUPS = {"two": 2, "four": 1}
"""Groups by the ranks in each."""


def straddling(image_segments: int) -> PackedBatch:
    """128 tokens, of which image tokens 30-33, 62-65 and 95-98 lie on the borders of four parts of 32; the last is padding in part."""
    first = [text(30, 0), image(0), text(28, 1), image(1), text(29, 2), image(2)]
    return batch_of([first, [text(7, 3)], [text(5, 4), *[image(9)] * image_segments]], sources=[1, 0, 4])


def heaviest() -> PackedBatch:
    config = Config().data
    config.context, config.images.size, config.images.tokens, config.images_per_pack = 2040, IMAGE_SIZE, IMAGE_TOKENS, 12
    return heaviest_batch(config, with_images=True)


def jobs() -> dict[str, dict[str, Any]]:
    """By name: the batches of each group, and the model's settings."""
    mixed, words = batch_of([*mixed_segments(), [text(40, 8)]], sources=[0, 2, 2, 0, 3, 5]), batch_of([[text(50, 9)], [text(3, 7)]])
    late = batch_of([[text(44, 5), image(4), text(2, 6)]])  # 64 tokens, its one image at 44
    steps = {
        "straddling": {2: [[straddling(1)], [mixed]], 1: [[straddling(1), mixed]]},
        "no images": {2: [[words], [batch_of([[text(20, 1)]])]], 1: [[words]]},
        "some images": {2: [[late, words], [straddling(0), batch_of([])]], 1: [[late, words, batch_of([])]]},
    }
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "frozen base, recomputed": {"frozen": True, "checkpointing": Checkpointing(Recompute.every)},
        "marks, low rank everywhere": {"marks": True, "mode": "lora", "checkpointing": Checkpointing(Recompute.full)},
    }
    found = {}
    for (data, by_groups), (how, values) in [(s, v) for s in steps.items() for v in settings.items()]:
        for name, groups in GROUPS.items():
            if data == "straddling" or how == "plain":
                found[f"{data}, {how}, {name}"] = {"groups": by_groups[groups], **values}
    return {**found, "memory, all trained": memory_job(False), "memory, frozen base": memory_job(True)}


def memory_job(frozen: bool) -> dict[str, Any]:
    """The heaviest batch in a wider model, under attention that keeps what a fused kernel keeps."""
    return {"groups": [[heaviest()]], "longest_plain": 0, "frozen": frozen, "wide": True}


JOBS = jobs()
PARITY = [name for name in JOBS if "memory" not in name]


@pytest.fixture(scope="module")
def shared(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All jobs, on four ranks."""
    folder = tmp_path_factory.mktemp("sequence")
    torch.save(JOBS, folder / "jobs.pt")
    worker = Path(__file__).parents[1] / "support" / "sequence_worker.py"
    command = [sys.executable, str(worker), str(folder / "jobs.pt"), str(folder / "out.pt")]
    run_ranks(command, {"OMP_NUM_THREADS": environment["OMP_NUM_THREADS"]}, WORLD)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", PARITY)
def test_loss_and_gradients_of_the_parts_are_those_of_one_process(shared, name):
    batches = [batch for group in JOBS[name]["groups"] for batch in group]
    n_global = sum(batch.supervised for batch in batches)
    model = build(JOBS[name])
    sums, counts, _ = measure(model, batches, 1, n_global)
    assert shared[name]["counts"].tolist() == counts.tolist()
    torch.testing.assert_close(shared[name]["sums"] / n_global, sums / n_global, atol=1e-5, rtol=1e-5)
    expected = gradients(model)
    assert shared[name]["gradients"].keys() == expected.keys()
    for key, gradient in expected.items():
        difference = (shared[name]["gradients"][key] - gradient).abs().max()
        assert difference <= 1e-5 * max(1.0, gradient.abs().max()), f"{key}: {difference}"
    assert any(gradient.abs().max() > 1e-3 for key, gradient in expected.items() if "vision" in key) or "no images" in name


def test_what_was_compared_had_images_on_borders_and_parts_without_any(shared):
    assert [rank["tiles"] for rank in shared["straddling, plain, four"]["by_rank"]] == [[1, 3], [2, 1], [2, 1], [2, 1]]
    assert straddling(1).cu_seqlens.tolist() == [0, 99, 106, 115, 128], "segments that go on behind a border, and begin inside a part"
    parts = [part_of(straddling(1), rank, WORLD, IMAGE_TOKENS) for rank in range(WORLD)]
    assert [part.image_lengths for part in parts] == [(2,), (2, 2), (2, 1), (3, 4)], "of each image a part"
    late = [part_of(JOBS["some images, plain, two"]["groups"][0][0], rank, 2, IMAGE_TOKENS) for rank in range(2)]
    assert [part.image_count for part in late] == [0, 1]


@pytest.mark.parametrize("name", [name for name in JOBS if "memory" in name])
def test_the_planned_activations_of_a_part_are_what_autograd_keeps(shared, name):
    job = JOBS[name]
    model = build(job)
    for rank, kept in enumerate(found["kept"] for found in shared[name]["by_rank"]):
        part = part_of(heaviest(), rank, WORLD, IMAGE_TOKENS)
        head = 2 * 4 * len(part.targets) * model.head.weight.shape[0]  # gradients of the logits, which are not there yet
        estimate = memory.activations(model, Shape.of(part), Checkpointing(), torch.float32) - head
        assert estimate == pytest.approx(kept, rel=0.1), rank


@pytest.fixture(scope="module")
def runs(demo: Any, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """6 steps: `one` rank under ZeRO-2; `two` that share packs; `again` and `apart`, their second half anew, the latter without sharing;
    the first two of `two` under ZeRO-3; and `torn`, where one of two reads another third step.
    """
    folder = tmp_path_factory.mktemp("shared_packs")
    sections: dict[str, dict[str, Any]] = {
        "data": {"images": {"size": 32, "tokens": 4, "crop": 0.1}},
        "model": {
            "projector": {"merge": 1},
            "decoder": {"vocab": 4096, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64, "rope_theta": 10000.0},
            "plora": {"rank": 4, "alpha": 4.0, "dropout": 0.0},
        },
        "train": {"steps": 6, "schedule": "constant", "warmup": 0.0},
        "checkpoint": {"every": 3},
        "deepspeed": {"stage": 2},
        "evaluate": {"text": str(demo.source("heldout/text"))},
    }
    made = {name: make_stage(demo, environment, folder / name, sections) for name in ("one", "two", "zero-3", "again", "apart", "torn")}
    shares, validates = "parallel.sequence=2", "evaluate.every=3"
    live_together([Life(made["one"], (validates,))], world=1)
    live_together([Life(made["two"], (shares, validates)), Life(made["zero-3"], (shares, "deepspeed.stage=3", "train.steps=2"))])
    for name in ("again", "apart"):
        shutil.copytree(made["two"].run.path, made[name].run.path)
        made[name].forget_after(3)
    live_together([Life(made["again"], (shares,)), Life(made["apart"]), Life(made["torn"], (shares,), reads_otherwise={1: 3})])
    return made


@pytest.mark.parametrize(("name", "steps"), [("two", 6), ("zero-3", 2)])
def test_a_run_whose_ranks_share_packs_has_the_losses_and_counts_of_one_rank(runs, name, steps):
    lines = [jsonl.read(runs[each].run.metrics)[:steps] for each in ("one", name)]
    assert [len(each) for each in lines] == [steps, steps]
    exact = ("data/", "tokens_by_source/", "health/bad")
    for one, shared in zip(*lines, strict=True):
        assert {k: v for k, v in shared.items() if k.startswith(exact)} == {k: v for k, v in one.items() if k.startswith(exact)}
        validated = ("validation/",) if name == "two" else ()
        near = {k: v for k, v in one.items() if k.startswith(("loss/", "loss_by_source/", "optim/grad_norm", *validated))}
        assert {k: shared[k] for k in near} == pytest.approx(near, abs=1e-4, rel=1e-4)
        model_flops = [line["throughput/tflops_per_rank"] * line["throughput/step_s"] for line in (one, shared)]
        assert model_flops[1] == pytest.approx(model_flops[0] / 2), "a pack's work counts once, not on each of its ranks"
    assert ("validation/text/nll" in lines[1][-1]) == (name == "two")


def test_it_goes_on_from_a_checkpoint_bitwise_and_without_sharing_but_for_rounding(runs):
    assert runs["again"].resumed_from() == [None, 3]
    assert runs["again"].losses() == runs["two"].losses()
    assert runs["again"].weights() == runs["two"].weights()
    assert runs["apart"].resumed_from() == [None, 3]
    assert runs["apart"].losses() == pytest.approx(runs["two"].losses(), abs=1e-4)


def test_a_step_is_replayed_as_the_groups_ran_it(runs, xc_data, capfd):
    assert [find_step(runs[name].run.path, 5).world for name in ("one", "two", "apart")] == [1, 1, 2]
    assert xc_data("replay", runs["two"].run.path, "--step", 5) == 0
    assert "warning" not in capfd.readouterr().err, "the supervised tokens are those that the run noted"


def test_ranks_of_a_group_that_read_different_samples_are_noticed_and_other_groups_may_differ():
    def doubt(values: list[int]) -> int:
        groups = [SequenceGroup(rank // 2, 2, rank % 2, 2, None) for rank in range(4)]
        return sum(group.doubt(value) for group, value in zip(groups, values, strict=True))

    one, another = fingerprint([straddling(1)]), fingerprint([straddling(0)])
    assert one != another
    assert doubt([one, one, another, another]) == 0
    assert doubt([one, one, one, another]) != 0


def test_a_step_that_ranks_of_a_group_read_differently_is_not_trained(runs):
    said = runs["torn"].run.read_outcome()
    assert (said["code"], list(runs["torn"].losses())) == (EXIT_TRY_AGAIN, [1, 2])
    assert "read step 3 differently" in said["reason"]


@pytest.mark.parametrize(
    ("overrides", "procs", "says"),
    [
        (["parallel.sequence=3"], 3, "model.decoder.kv_heads"),
        (["parallel.sequence=0"], 1, "parallel.sequence"),
        (["parallel.sequence=2"], 3, "parallel.sequence"),
    ],
)
def test_ranks_or_heads_that_do_not_divide_are_refused_before_anything_starts(runs, tmp_path, capfd, overrides, procs, says):
    with pytest.raises(SystemExit) as refused:
        main(["run", str(runs["two"].config), *overrides, f"run.dir={tmp_path / 'run'}", "--procs", str(procs)])
    assert refused.value.code == EXIT_USER
    errors = capfd.readouterr().err.strip()
    assert says in errors and errors.endswith(")") and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_long_context_recipe_is_planned_with_its_tokens_shared_out():
    config = configure.load(Path(__file__).parents[2] / "configs" / "long_7b.yaml")
    assert (config.data.context, config.train.checkpointing.kind) == (32768, Recompute.full)
    assert config.parallel.sequence > 1
    gpus = Machine(gpus=64, memory_gib=80, peak=989e12, mfu=0.4)
    found, alone = look(config, gpus), look(replace(config, parallel=replace(config.parallel, sequence=1)), gpus)
    assert found.step == alone.step, "sharing changes nothing in what a step costs"
    share = alone.memory.activations / config.parallel.sequence
    assert share < found.memory.activations < 1.25 * share + 2**30, "the head's chunk is not shared, nor the border's tile"
    said = page(config, gpus)
    assert f"micro-steps on 64 GPUs, each pack on {config.parallel.sequence}" in said and ": fits" in said
    with pytest.raises(UserError, match=r"parallel\.sequence"):
        page(config, replace(gpus, gpus=12))
    many = SlurmConfig(nodes=32, gpus_per_node=8)
    assert not wasteful(config, many), "128 packs over 32 groups"
    assert wasteful(replace(config, parallel=replace(config.parallel, sequence=1)), many), "and over 256 ranks"
