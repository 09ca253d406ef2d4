"""The shipped configurations are the published models, to the last parameter, and say what is theirs to fill."""

import re
from pathlib import Path

import pytest
import torch

from train import configure, optim
from train.cli import main
from train.model.xcomposer2 import XComposer2

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE_7B, PLORA_7B, VIT_490, PROJECTOR_7B = 7_737_708_544, 603_979_776, 304_169_984, 20_979_712
VIT_224 = VIT_490 - (35**2 - 16**2) * 1024
BASE_1_8B = 2 * 92544 * 2048 + 24 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 8192 + 2 * 2048) + 2048
PLORA_1_8B = 24 * 256 * ((2048 + 4096) + (2048 + 2048) + 3 * (2048 + 8192))
VIT_336 = VIT_490 - (35**2 - 24**2) * 1024
PLORA_KHD = PLORA_7B - 32 * (256 - 8) * (4096 + 6144)
PROJECTOR_KHD = 2 * (4096 * 4096 + 4096) + 2 * 4096
PROJECTOR_1_8B = 1024 * 2048 + 2048 + 2048 * 2048 + 2048


@pytest.mark.parametrize(
    ("name", "counts", "trained"),
    [
        ("pretrain_7b", (BASE_7B, PLORA_7B, VIT_490, PROJECTOR_7B), PLORA_7B + VIT_490 + PROJECTOR_7B),
        ("sft_7b", (BASE_7B, PLORA_7B, VIT_490, PROJECTOR_7B), None),
        ("long_7b", (BASE_7B, PLORA_7B, VIT_490, PROJECTOR_7B), None),
        ("compose_7b", (BASE_7B, PLORA_7B, VIT_224, PROJECTOR_7B), None),
        ("khd_7b", (BASE_7B, PLORA_KHD, VIT_336, PROJECTOR_KHD), PLORA_KHD + VIT_336 + PROJECTOR_KHD),
        ("pretrain_1_8b", (BASE_1_8B, PLORA_1_8B, VIT_490, PROJECTOR_1_8B), PLORA_1_8B + VIT_490 + PROJECTOR_1_8B),
    ],
)
def test_a_published_size_has_the_published_number_of_parameters(name, counts, trained):
    config = configure.load(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    found = {"plora": 0, "vision": 0, "projector": 0, "base": 0}
    for parameter_name, parameter in model.named_parameters():
        part = "plora" if ".plora_" in parameter_name else parameter_name.partition(".")[0]
        found[part if part in found else "base"] += parameter.numel()
    assert not list(model.buffers())  # they would be left empty when a run builds its model without memory first
    assert (found["base"], found["plora"], found["vision"], found["projector"]) == counts
    groups, frozen = optim.resolve(model, config.train)
    assert sum(g.count for g in groups) == (trained or sum(counts))
    assert sum(g.count for g in groups + frozen) == sum(counts)


def test_a_language_model_is_trained_at_a_fifth_of_the_rate_in_sft():
    config = configure.load(CONFIGS / "sft_7b.yaml")
    config.model.decoder.layers = 1
    with torch.device("meta"):
        model = XComposer2(config.model, config.data.images.size)
    groups, _ = optim.resolve(model, config.train)
    scale = {name: g.lr_scale for g in groups for name in g.names}
    assert scale["decoder.layers.0.attention.wqkv.weight"] == scale["head.weight"] == 0.2
    assert scale["decoder.layers.0.attention.wqkv.plora_a"] == scale["projector.linear_in.weight"] == 1.0
    assert scale["vision.vit.blocks.23.mlp.fc1.weight"] == pytest.approx(0.9)


@pytest.mark.parametrize("name", ["pretrain_7b", "sft_7b", "long_7b", "compose_7b", "khd_7b"])
def test_the_fullest_pack_of_a_7b_leaves_the_allocator_a_tenth_of_80_gib(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIGS / f"{name}.yaml"), "--gpus", "64"])
    assert ended.value.code == 0
    planned = re.search(r"memory +([\d.]+) GiB of 80 a GPU, .*: fits", capsys.readouterr().out)
    assert planned and float(planned[1]) < 72


@pytest.mark.parametrize("name", ["pretrain_7b", "sft_7b", "long_7b", "compose_7b", "khd_7b", "pretrain_1_8b"])
def test_a_folder_that_is_yours_to_fill_is_named(name, tmp_path, capfd):
    config = str(CONFIGS / f"{name}.yaml")
    for override, says in (((), "weights/internlm2-chat-"), ((f"data.tokenizer={CONFIGS.parent}/examples/demo/tokenizer",), "data/")):
        with pytest.raises(SystemExit) as ended:
            main(["run", config, f"run.dir={tmp_path}/run", *override])
        error = capfd.readouterr().err.strip()
        assert ended.value.code == 2 and len(error.splitlines()) == 1 and says in error and error.endswith(")"), error
    assert not (tmp_path / "run").exists()
