"""The projector: image features to the decoder's width, merging neighbouring patches into one image token.

Invariant: image tokens are in row-major order of the merged grid, and inside a token the patches are too. Newline and separator, where
there are any, go through the same layers, in every pass and whether or not a batch places them. What features are standardised by never
trains: it is measured once, and belongs to the weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError


class Projector(nn.Module):
    """Merge `merge` x `merge` patches on the channels, Linear, GELU (exact), Linear.

    With `marks`, two learned embeddings of the merged width stand between the image tokens (4KHD): a newline and a separator.
    With `standardise`, features are first brought to mean 0 and deviation 1, channel by channel.
    """

    def __init__(self, grid: int, vision_width: int, width: int, merge: int, marks: bool = False, standardise: bool = False) -> None:
        super().__init__()
        if grid % merge:
            raise UserError(f"model.projector.merge is {merge}, which does not divide the ViT's grid of {grid} x {grid} patches")
        self.merge = merge
        self.merged_grid = grid // merge
        self.linear_in = nn.Linear(merge * merge * vision_width, width)
        self.linear_out = nn.Linear(width, width)
        self.standardise = standardise
        if standardise:
            self.feature_mean = nn.Parameter(torch.full((vision_width,), math.nan), requires_grad=False)
            self.feature_std = nn.Parameter(torch.full((vision_width,), math.nan), requires_grad=False)
        self.marks = marks
        if marks:
            self.newline = nn.Parameter(torch.full((1, merge * merge * vision_width), math.nan))
            self.separator = nn.Parameter(torch.full((1, merge * merge * vision_width), math.nan))

    @property
    def tokens(self) -> int:
        """Image tokens of one tile."""
        return self.merged_grid**2

    def forward(self, features_MPD: Tensor, image_rows_V: Tensor | None = None) -> Tensor:
        """[V, width]: the image tokens. `image_rows_V` names their rows of [M * tokens, newline, separator]; by default all, in order.

        Each row is projected once, however often it is placed.
        """
        M, _, D = features_MPD.shape
        g, m = self.merged_grid, self.merge
        if self.standardise:
            features_MPD = (features_MPD - self.feature_mean) / self.feature_std
        cells = features_MPD.reshape(M, g, m, g, m, D).transpose(2, 3)
        # Two dimensions: a linear on a strided 3-D slice becomes a slow batched product.
        merged = cells.reshape(M * g * g, m * m * D)
        if self.marks:
            merged = torch.cat([merged, self.newline, self.separator])
        projected = self.linear_out(F.gelu(self.linear_in(merged)))
        return projected if image_rows_V is None else projected.index_select(0, image_rows_V)
