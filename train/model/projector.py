"""The projector: image features to the decoder's width, merging neighbouring patches into one image token.

Invariant: image tokens are in row-major order of the merged grid, and inside a token the patches are too.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError


class Projector(nn.Module):
    """Merge `merge` x `merge` patches on the channels, Linear, GELU (exact), Linear."""

    def __init__(self, grid: int, vision_width: int, width: int, merge: int) -> None:
        super().__init__()
        if grid % merge:
            raise UserError(f"model.projector.merge is {merge}, which does not divide the ViT's grid of {grid} x {grid} patches")
        self.merge = merge
        self.merged_grid = grid // merge
        self.linear_in = nn.Linear(merge * merge * vision_width, width)
        self.linear_out = nn.Linear(width, width)

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return self.merged_grid**2

    def forward(self, features_MPD: Tensor) -> Tensor:
        """[M * tokens, width]: the image tokens of all images, one after another."""
        M, _, D = features_MPD.shape
        g, m = self.merged_grid, self.merge
        cells = features_MPD.reshape(M, g, m, g, m, D).transpose(2, 3)
        # Two dimensions: a linear on a strided 3-D slice becomes a slow batched product.
        merged = cells.reshape(M * g * g, m * m * D)
        return self.linear_out(F.gelu(self.linear_in(merged)))
