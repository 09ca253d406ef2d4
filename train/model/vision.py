"""The vision tower: a timm ViT up to one block, its patch features, un-normed, without class and register tokens.

Invariant: every parameter takes part in every forward pass (a parameter without gradient is a trap under DeepSpeed): blocks above
the chosen one, the final norm and the pooling are not there.
"""

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline.errors import UserError
from train.model.attention import LONGEST_PLAIN
from train.model_config import VisionConfig


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: its backward pass is 20 times as fast on a CPU in bf16."""

    def forward(self, images_MCHW: Tensor) -> Tensor:
        """[M, width, rows, columns]."""
        M, C, height, width = images_MCHW.shape
        p, q = self.kernel_size
        patches = images_MCHW.view(M, C, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class VisionTower(nn.Module):
    """Images [M, 3, H, W] uint8 to features [M, P, width]; patches in row-major order of a `grid` x `grid` square."""

    def __init__(self, config: VisionConfig, image_size: int) -> None:
        super().__init__()
        arguments = {"global_pool": "", **config.overrides}  # no pooling head; a ViT without class token refuses timm's default
        try:
            vit = timm.create_model(config.name, pretrained=False, img_size=image_size, num_classes=0, **arguments)
        except (RuntimeError, TypeError) as error:  # an unknown name; an unknown override
            raise UserError(f"model.vision: timm cannot build {config.name} with {arguments}: {error}") from error
        if not isinstance(vit, VisionTransformer):
            raise UserError(f"model.vision.name: {config.name} is a {type(vit).__name__}, not a timm VisionTransformer")
        if vit.patch_embed.patch_size != (config.patch, config.patch):
            raise UserError(f"model.vision.patch is {config.patch}, but {config.name} has {vit.patch_embed.patch_size[0]}")
        depth = len(vit.blocks)
        if not -depth <= config.block < depth:
            raise UserError(f"model.vision.block is {config.block}, but {config.name} has {depth} blocks")
        vit.blocks = vit.blocks[: config.block % depth + 1]
        vit.norm = vit.fc_norm = nn.Identity()
        vit.attn_pool = None
        vit.patch_embed.proj.__class__ = PatchConv2d  # the same parameters
        self.vit = vit
        self.width: int = vit.embed_dim
        self.grid: int = vit.patch_embed.grid_size[0]
        self.mean, self.std = list(config.mean), list(config.std)

    def forward(self, images_MCHW: Tensor) -> Tensor:
        """[M, P, width]."""
        fused = images_MCHW.is_cuda or self.grid**2 > LONGEST_PLAIN  # as for the decoder's attention
        for module in self.vit.modules():
            if isinstance(module, Attention):
                module.fused_attn = fused
        return self.vit.forward_features(self._normalise(images_MCHW))[:, self.vit.num_prefix_tokens :]

    def _normalise(self, images_MCHW: Tensor) -> Tensor:
        """In fp32, then cast to the weights' dtype. Mean and std stay Python floats: a buffer would be rounded by `.bfloat16()`."""
        channels = zip(images_MCHW.float().unbind(1), self.mean, self.std, strict=True)
        pixels = torch.stack([(channel - 255 * mean) / (255 * std) for channel, mean, std in channels], dim=1)
        return pixels.to(self.vit.patch_embed.proj.weight.dtype)
