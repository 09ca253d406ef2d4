"""The FLOPs that are reported are those that run: of the products as torch counts them, of attention by its closed form."""

from itertools import product

import pytest
import torch
from batches import IMAGE_SIZE, batch_of, image, mixed_segments, text, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from train.config import Checkpointing, Recompute
from train.flops import Flops, Shape, StepCost, peak_flops
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRankMode

TRAINED = {
    "language": lambda name: name.startswith(("decoder", "head")) and "plora" not in name,
    "pretrain": lambda name: "plora" in name or name.startswith(("vision", "projector")),
    "sft": lambda name: True,
    "upper half of the ViT": lambda name: "plora" in name or name.startswith(("vision.vit.blocks.2", "projector")),
    "PLoRA alone": lambda name: "plora" in name,
    "norms alone": lambda name: "ffn_norm" in name,
    "head alone": lambda name: name.startswith("head"),
}
MODES = {
    "none": Checkpointing(),
    "full": Checkpointing(Recompute.full),
    "every": Checkpointing(Recompute.every, 2),
    "ops": Checkpointing(Recompute.ops),
}
LINEAR = ("mm", "addmm")
"""What linears become; plain attention is `bmm` and `baddbmm`."""


def model_of(trained: str, mode: str, layers: int = 3, low_rank: LowRankMode = LowRankMode.plora) -> XComposer2:
    config = tiny_config()
    config.decoder.layers, config.plora.mode = layers, low_rank
    model = XComposer2(config, IMAGE_SIZE)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    model.apply_cost_settings(MODES[mode])
    return model


def counted(model: XComposer2, batch) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    return {operator.__name__: flops for operator, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize(("trained", "mode"), product(TRAINED, MODES))
def test_products_are_those_that_torch_counts(trained: str, mode: str) -> None:
    model, batch = model_of(trained, mode), batch_of(mixed_segments())
    parts = StepCost.of(model, MODES[mode]).by_part(Shape.of(batch))
    ours = sum(flops.hardware for part, flops in parts.items() if part != "attention")
    theirs = sum(flops for name, flops in counted(model, batch).items() if name in LINEAR)
    assert ours == pytest.approx(theirs, rel=0.01)
    recomputed = sum(flops.recomputed for flops in parts.values())
    assert (recomputed > 0) == (mode != "none" and trained != "head alone")


@pytest.mark.parametrize(
    ("low_rank", "trained", "mode"),
    [
        *product([LowRankMode.lora], ["language", "pretrain", "sft", "PLoRA alone"], ["none", "full"]),
        *product([LowRankMode.none], ["language", "sft"], ["none", "full"]),
    ],
)
def test_products_of_low_rank_weights_on_all_tokens_or_on_none_are_those_that_torch_counts(low_rank, trained: str, mode: str) -> None:
    model, batch = model_of(trained, mode, low_rank=low_rank), batch_of(mixed_segments())
    parts = StepCost.of(model, MODES[mode]).by_part(Shape.of(batch))
    assert ("plora" in parts) == (low_rank is LowRankMode.lora)
    ours = sum(flops.hardware for part, flops in parts.items() if part != "attention")
    theirs = sum(flops for name, flops in counted(model, batch).items() if name in LINEAR)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_logits_of_many_targets_are_computed_twice() -> None:
    model, batch = model_of("sft", "none"), batch_of(mixed_segments())
    once = StepCost.of(model, MODES["none"]).by_part(Shape.of(batch))["head"]
    model.head.chunk_rows = 8
    twice = StepCost.of(model, MODES["none"]).by_part(Shape.of(batch))["head"]
    assert twice == Flops(once.forward, once.backward, once.forward)
    assert sum(counted(model, batch)[name] for name in LINEAR) == pytest.approx(
        sum(f.hardware for p, f in StepCost.of(model, MODES["none"]).by_part(Shape.of(batch)).items() if p != "attention"), rel=0.01
    )


@pytest.mark.parametrize("mode", ["none", "full"])
def test_attention_is_its_closed_form(mode: str) -> None:
    """Forward 4 x pairs x width, backward twice that: pairs inside segments that causality leaves, and all pairs of an image."""
    batch = batch_of([[image(0), text(11, 0)], [text(20, 1)]], round_tokens=5)
    assert batch.segment_lengths == (15, 20, 5)
    flops = StepCost.of(model_of("sft", mode), MODES[mode]).by_part(Shape.of(batch))["attention"]
    decoder, vision = 3 * 48 * (15 * 16 + 20 * 21 + 5 * 6) // 2, 3 * 32 * 5**2
    assert flops.forward == 4 * (decoder + vision)
    assert flops.backward == 2 * flops.forward
    assert flops.recomputed == (flops.forward if mode == "full" else 0)


def test_plain_attention_runs_those_products_and_their_hidden_half() -> None:
    """Segments of full buckets: torch counts every pair of a square, of which causality hides almost half."""
    batch = batch_of([[text(16, 0)], [text(16, 1)]], round_tokens=8)
    model = model_of("sft", "none")
    theirs = sum(flops for name, flops in counted(model, batch).items() if name in ("bmm", "baddbmm"))
    squares = 3 * 48 * (16**2 + 16**2 + 8**2) + 3 * 32 * 5**2
    assert theirs == 3 * 4 * squares


def test_padding_and_dummies_are_hardware_but_not_useful() -> None:
    empty = batch_of([])
    cost = StepCost.of(model_of("sft", "none"), MODES["none"])
    assert cost.total(Shape.of(empty)).model > 0
    assert cost.total(Shape.useful(empty)).model == 0
    full = batch_of(mixed_segments())
    assert 0 < cost.total(Shape.useful(full)).model < cost.total(Shape.of(full)).model


def test_pretraining_the_7b_costs_what_the_rule_of_thumb_says() -> None:
    """4 x the frozen decoder a token, 6 x PLoRA an image token, 3 x 0.9 TFLOP an image; the rule leaves out head, projector, pairs."""
    from train.config import ModelConfig

    with torch.device("meta"):
        model = XComposer2(ModelConfig(), 490, 1225)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED["pretrain"](name))
    parts = StepCost.of(model, MODES["none"]).by_part(Shape((1365, 1365, 1365, 1), 3, 3675, 64))
    linears = 7_737_708_544 - 2 * 92544 * 4096
    assert parts["decoder"].model == pytest.approx(4 * linears * 4096, rel=0.001)
    assert parts["plora"].model == 6 * 603_979_776 * 3675
    vision = parts["vision"].forward + 3 * 24 * 4 * 1226**2 * 1024
    assert vision == pytest.approx(3 * 0.9e12, rel=0.03)


def test_peaks_are_known_by_the_names_that_torch_gives() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    assert peak_flops("NVIDIA RTX A1000") is peak_flops("Some other GPU") is None
