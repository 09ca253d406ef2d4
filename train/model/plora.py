"""Partial LoRA (arXiv 2401.16420, section 3.2): a linear layer with low-rank weights that act on image tokens only.

Invariant: at positions that are not in `image_index` the output is that of the base layer, bitwise, whatever the low-rank weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import LowRankMode, PLoRAConfig


class PLoRALinear(nn.Module):
    """`y = W x; y[image_index] += alpha / rank * B(A(dropout(x[image_index])))`, without bias.

    W, A and B are parameters of one module because ZeRO-3 gathers by module. They are NaN until they are initialised or loaded, so
    that forgetting it is loud. For ablations A and B may act on all rows (`lora`) or be absent (`none`).
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, mode: LowRankMode = LowRankMode.plora
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((out_features, in_features), math.nan))
        self.mode = mode
        if mode is not LowRankMode.none:
            self.plora_a = nn.Parameter(torch.full((rank, in_features), math.nan))
            self.plora_b = nn.Parameter(torch.full((out_features, rank), math.nan))
        self.scale = alpha / rank
        self.dropout = dropout

    @staticmethod
    def of(config: PLoRAConfig, name: str, in_features: int, out_features: int) -> "PLoRALinear":
        """The linear called `name` (wqkv, wo, w1, w3, w2), with the rank and alpha that the config gives it."""
        own = config.linears.get(name, config)
        return PLoRALinear(in_features, out_features, own.rank, own.alpha, config.dropout, config.mode)

    def forward(self, x_TD: Tensor, image_index_V: Tensor, image_rows_VD: Tensor | None = None) -> Tensor:
        """[T, out]. `image_rows_VD` is `x_TD[image_index_V]` where the caller shares it between linears that read the same x."""
        if self.mode is LowRankMode.none:
            return F.linear(x_TD, self.weight)
        if self.mode is LowRankMode.lora:
            return F.linear(x_TD, self.weight).add_(self._low_rank(x_TD), alpha=self.scale)
        if image_rows_VD is None:
            image_rows_VD = x_TD.index_select(0, image_index_V)
        delta_VD = self._low_rank(image_rows_VD)
        # In place: W's product is not needed for any gradient. index_add and not a mask: no dense second product, no host sync.
        return F.linear(x_TD, self.weight).index_add_(0, image_index_V, delta_VD, alpha=self.scale)

    def _low_rank(self, rows: Tensor) -> Tensor:
        return F.linear(F.linear(F.dropout(rows, self.dropout, self.training), self.plora_a), self.plora_b)
