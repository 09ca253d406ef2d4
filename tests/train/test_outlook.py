"""`xc-train plan` says what a stage costs: from the config alone, from the data where it is indexed, and for the 7B on a laptop."""

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from batches import IMAGE_SIZE, tiny_config
from stages import stage_settings

from data_pipeline.loader import Loader
from data_pipeline.opened import open_data
from data_pipeline.plan.origin import Cursor
from train import cli, configure, memory
from train.config import Checkpointing, Config, GroupRule, OffloadConfig, OffloadTo, Recompute
from train.flops import Shape, StepCost, cost_model
from train.model import attention
from train.model.xcomposer2 import XComposer2
from train.outlook import SAMPLED_STEPS, Machine, look, page
from train.rehearsal import heaviest_batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPU = Machine(gpus=64, memory_gib=80, peak=989e12, mfu=0.4)


def pretraining_7b() -> Config:
    """The paper's pretraining, without data at hand."""
    config = Config()
    config.run.seed, config.train.lr, config.train.steps = 0, 2e-4, 1000
    config.data.tokenizer, config.data.global_batch, config.data.images_per_pack = "/nowhere", 1365, 3
    config.train.groups = [GroupRule("^(vision|projector)"), GroupRule("plora"), GroupRule(".*", trainable=False)]
    return config


def test_the_7b_is_planned_without_weights_or_data() -> None:
    config = pretraining_7b()
    found = look(config, GPU)
    assert found.trained == 603_979_776 + 304_169_984 + 20_979_712
    assert found.frozen == 7_737_708_544
    assert "cannot be read" in found.assumed
    seconds = found.step_model_flops / (64 * GPU.peak * GPU.mfu)
    assert found.gpu_hours(GPU) == pytest.approx(1000 * seconds * 64 / 3600)
    assert 4 * 6.98e9 * 1365 * 4096 < found.step_model_flops < 8 * 6.98e9 * 1365 * 4096
    text = page(config, GPU)
    assert re.search(r"memory +\d+\.\d+ GiB of 80 a GPU, ZeRO-2, checkpointing none: (fits|does not fit)", text)
    assert "days on 64 GPUs at 40% MFU" in text


@pytest.mark.parametrize(
    ("name", "kind", "gpus", "says"),
    [
        ("pretrain_7b", None, 64, "the fullest pack needs {} of 80 GiB"),
        ("pretrain_7b", "full", 64, "`full` needs {},"),
        ("khd_7b", None, 64, "the fullest pack needs {} of 80 GiB"),
        ("khd_7b", "none", 64, "without it {},"),
        ("sft_7b", None, 64, "the fullest pack needs {} of 80 GiB on 64 GPUs"),
        ("sft_7b", None, 8, "{} on 8;"),
        ("sft_7b", "full", 64, "`full` needs {} on 64"),
    ],
)
def test_what_a_recipe_says_that_it_needs_is_what_the_plan_says(name, kind, gpus, says) -> None:
    file = CONFIGS / f"{name}.yaml"
    config = configure.load(file, [f"train.checkpointing.kind={kind}"] if kind else [])
    needed = look(config, replace(GPU, gpus=gpus)).memory.device / 2**30
    assert says.format(round(needed)) in file.read_text()


def test_more_zero_and_checkpointing_need_less() -> None:
    needs = []
    for stage, kind in ((1, Recompute.none), (2, Recompute.none), (2, Recompute.full), (3, Recompute.full)):
        config = pretraining_7b()
        config.deepspeed.stage, config.train.checkpointing = stage, Checkpointing(kind)
        needs.append(look(config, GPU).memory)
    assert [m.device for m in needs] == sorted((m.device for m in needs), reverse=True)
    assert "offloaded" not in page(config, GPU)
    config.deepspeed.offload.optimizer = OffloadTo.cpu
    assert "offloaded" in page(config, GPU)


def test_what_is_offloaded_is_counted_outside_the_gpu_whichever_key_says_so() -> None:
    config = pretraining_7b()
    config.deepspeed.stage = 3
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size)

    def states(typed: OffloadConfig, **extra: dict | None) -> memory.Memory:
        config.deepspeed.offload, config.deepspeed.extra = typed, {"zero_optimization": extra}
        return memory.states(model, config, 64, torch.bfloat16)

    nothing, moved = states(OffloadConfig()), states(OffloadConfig(optimizer=OffloadTo.cpu))
    assert moved.optimizer == moved.gradients == 0
    assert moved.offloaded == nothing.optimizer + nothing.gradients > 0
    assert states(OffloadConfig(), offload_optimizer={"device": "cpu"}) == moved
    assert states(OffloadConfig(optimizer=OffloadTo.cpu), offload_optimizer={"pin_memory": False}) == moved
    assert states(OffloadConfig(optimizer=OffloadTo.cpu), offload_optimizer=None) == nothing, "extra has the last word"
    moved = states(OffloadConfig(parameters=OffloadTo.nvme))
    assert moved.weights < nothing.weights == moved.weights + moved.offloaded

    whole = 2 * sum(p.numel() for p in model.parameters())
    config.deepspeed.zero_pp.partition_ranks = 8
    assert states(OffloadConfig()).device - nothing.device == pytest.approx(whole / 8, abs=2), "ZeRO++'s second copy"
    assert states(OffloadConfig(parameters=OffloadTo.cpu)).offloaded == pytest.approx(whole / 8 + whole / 64, abs=2)


def test_indexed_data_gives_steps_and_its_own_cost(demo, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import yaml

    settings = stage_settings(demo, tmp_path / "run")
    settings["data"]["unit"] = "epochs"
    del settings["train"]["steps"]
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(settings))
    found = look(configure.load(tmp_path / "stage.yaml"), GPU)
    assert found.steps and found.packs == 4
    assert "data plan" in found.assumed
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(tmp_path / "stage.yaml"), "--gpus", "2", "train.lr=0.5"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "5.00e-01" in out and f"steps        {found.steps:,}" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["square", "partition"])
def test_the_cost_of_indexed_data_is_that_of_the_micro_batches_which_run(policy: str, demo, tmp_path: Path, monkeypatch) -> None:
    import yaml

    settings = stage_settings(demo, tmp_path / "run")
    settings["data"] |= {"images": {"size": 32, "tokens": 1, "policy": policy, "most_tiles": 4}, "images_per_pack": 40}
    settings["model"]["projector"]["marks"] = True
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(settings))
    config = configure.load(tmp_path / "stage.yaml")
    loader = Loader(config.data, open_data(config.data, 7, 24), 7, cost_model(config), 0, 1, Cursor(0, 0), 0)
    shapes = [Shape.useful(micro.batch) for step in islice(loader, SAMPLED_STEPS) for micro in step.micro_batches]
    shapes = [replace(shape, targets=shape.tokens - shape.image_tokens) for shape in shapes]  # every word
    middle = sorted(shape.targets for shape in shapes)[len(shapes) // 2]
    monkeypatch.setattr("train.model.decoder.CHUNK_LOGITS", 4096 * (middle - 1))

    found = look(config, GPU).step
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size)
    cost = StepCost.of(model, config.train.checkpointing)
    parts = [cost.by_part(shape) for shape in shapes]
    for part in ("plora", "vision", "head"):
        mean = [sum(flops) / SAMPLED_STEPS for flops in zip(*(each[part] for each in parts), strict=True)]
        assert found[part] == pytest.approx(mean, abs=1), part
    assert 0 < found["head"].recomputed < found["head"].forward


def test_a_plan_of_nothing_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "train.lr=1"])
    assert ended.value.code == 2


def test_the_heaviest_batch_keeps_the_contract_of_batches_and_the_budgets() -> None:
    config = pretraining_7b().data
    config.micro_packs, config.images.size, config.images.tokens, config.context = 2, 56, 16, 100
    config.images_per_pack = 9
    batch = heaviest_batch(config, with_images=True)
    assert batch.segment_lengths == (100, 100, 8)
    assert batch.cu_seqlens.tolist() == [0, 100, 200, 208]
    assert batch.image_count == len(batch.images) == 2 * 6  # six of 16 tokens leave room for a word
    assert len(batch.image_index) == 12 * 16 and batch.image_index.max() < 196
    assert batch.supervised == 2 * 3 and (batch.targets != -100).sum() == 6
    assert not set(batch.target_index[:6].tolist()) & set(batch.image_index.tolist())
    words = heaviest_batch(config, with_images=False)
    assert words.image_count == 0 and len(words.images) == 1
    assert (words.image_index == 207).all()


@pytest.mark.parametrize("trained", ["everything", "all but the decoder"])
@pytest.mark.parametrize("kind", [Recompute.none, Recompute.full, Recompute.every, Recompute.ops])
def test_activations_are_the_bytes_that_autograd_keeps(kind: Recompute, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_PLAIN", 0)  # a fused kernel, as on a GPU
    monkeypatch.setattr("train.model.vision.LONGEST_PLAIN", 0)
    config = tiny_config()
    config.decoder.hidden, config.decoder.ffn, config.decoder.layers = 96, 256, 4
    model = XComposer2(config, IMAGE_SIZE)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "everything" or "plora" in name or not name.startswith(("decoder", "head")))
    checkpointing = Checkpointing(kind)
    model.apply_cost_settings(checkpointing)
    data = pretraining_7b().data
    data.context, data.images.size, data.images.tokens, data.images_per_pack = 504, IMAGE_SIZE, 4, 12
    batch = heaviest_batch(data, with_images=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch)
    if kind is not Recompute.none:  # autograd keeps a checkpoint's inputs in its closure, where no hook sees them
        assert sum(s.nbytes() for s in kept.values()) < memory.activations(model, Shape.of(batch), Checkpointing(), torch.float32)
        return
    head = 2 * 4 * len(batch.targets) * 97  # gradients of the logits, which are not there yet
    estimate = memory.activations(model, Shape.of(batch), checkpointing, torch.float32) - head
    assert estimate == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.1)
