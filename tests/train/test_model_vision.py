"""The vision tower gives a block's raw patch features; the projector merges neighbours in row-major order."""

import pytest
import timm
import torch
import torch.nn.functional as F

from data_pipeline.errors import UserError
from train.model.projector import Projector
from train.model.vision import VisionTower
from train.model_config import VisionConfig

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2}
CLIP = "vit_base_patch16_clip_quickgelu_224"


def config(name: str = "vit_tiny_patch16_224", block: int = -1, patch: int = 16, **overrides) -> VisionConfig:
    return VisionConfig(name, patch, block, {**TINY, **overrides}, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)  # timm draws its weights from the global generator


def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block,index", [(-1, 3), (-2, 2), (0, 0)])
@pytest.mark.parametrize(
    "name,overrides",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}),
        ("vit_tiny_patch16_224", {"class_token": False}),
        (CLIP, {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_features_are_timms_own_before_the_norm_without_prefix(name: str, overrides: dict, block: int, index: int) -> None:
    tower = VisionTower(config(name, block, **overrides), 48)
    whole = timm.create_model(name, img_size=48, num_classes=0, **{"global_pool": "", **TINY, **overrides})
    whole.load_state_dict(tower.vit.state_dict(), strict=False)
    pixels = (images() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    expected = whole.forward_intermediates(pixels, [index], norm=False, output_fmt="NLC", intermediates_only=True)[0]
    features = tower(images())
    assert features.shape == (2, 9, 32) == (2, tower.grid**2, tower.width)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=0)  # a block moves them by 0.05


@pytest.mark.parametrize("block", [-1, 1])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", CLIP, "vit_base_patch16_siglip_224"])
def test_every_parameter_of_the_tower_gets_a_gradient(name: str, block: int) -> None:
    tower = VisionTower(config(name, block), 48)
    tower(images()).square().sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []


def test_longer_inputs_use_the_fused_kernel_with_the_same_result(monkeypatch) -> None:
    tower = VisionTower(config(), 48)
    plain = tower(images())
    monkeypatch.setattr("train.model.vision.LONGEST_PLAIN", 4)
    torch.testing.assert_close(tower(images()), plain, atol=1e-4, rtol=0)
    assert all(block.attn.fused_attn for block in tower.vit.blocks)


def test_a_wrong_patch_block_or_architecture_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.vision.patch is 14.*16"):
        VisionTower(config(patch=14), 48)
    with pytest.raises(UserError, match=r"model.vision.block is 4.*4 blocks"):
        VisionTower(config(block=4), 48)
    with pytest.raises(UserError, match=r"model.vision.name: eva02_tiny_patch14_224 is a Eva"):
        VisionTower(VisionConfig("eva02_tiny_patch14_224", 14), 56)
    with pytest.raises(UserError, match=r"model.vision: timm cannot build vit_unheard_of"):
        VisionTower(config("vit_unheard_of"), 48)
    with pytest.raises(UserError, match=r"model.vision: timm cannot build .*embed_dims"):
        VisionTower(config(embed_dims=8), 48)


def test_projector_merges_a_square_of_neighbours_into_one_token() -> None:
    projector = Projector(grid=6, vision_width=5, width=7, merge=2)
    features = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    out = projector(features)
    assert projector.tokens == 9 and out.shape == (18, 7)
    for image, row, column in ((0, 0, 0), (0, 1, 2), (1, 2, 1)):
        corner = 6 * 2 * row + 2 * column
        cell = torch.cat([features[image, corner + offset] for offset in (0, 1, 6, 7)])
        expected = projector.linear_out(F.gelu(projector.linear_in(cell)))
        torch.testing.assert_close(out[9 * image + 3 * row + column], expected)


def test_standardised_features_have_lost_mean_and_deviation_of_each_channel() -> None:
    plain, standard = (Projector(2, vision_width=6, width=10, merge=2, standardise=on) for on in (False, True))
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    standard.load_state_dict({**plain.state_dict(), "feature_mean": mean, "feature_std": std})
    features = torch.randn(3, 4, 6) * std + mean
    torch.testing.assert_close(standard(features), plain((features - mean) / std))
    assert not torch.allclose(standard(features), plain(features))


def test_a_merge_that_does_not_fit_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.projector.merge is 2.*5 x 5"):
        Projector(grid=5, vision_width=4, width=4, merge=2)
