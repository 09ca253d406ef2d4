"""Partial LoRA (arXiv 2401.16420, section 3.2): a linear layer with low-rank weights that act on image tokens only.

Invariant: at positions that are not in `image_index` the output is that of the base layer, bitwise, whatever the low-rank weights.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model_config import LowRankMode, PLoRAConfig


class _TakeRows(torch.autograd.Function):
    """`x` and `x[index]`, whose gradient is added into that of `x` in place: torch alone would add up two of x's size.

    `x` may go into linears only: their gradient is new memory.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, index_V: Tensor) -> tuple[Tensor, Tensor]:
        """`x_TD` itself, and its rows."""
        ctx.save_for_backward(index_V)
        return x_TD.view_as(x_TD), x_TD.index_select(0, index_V)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor, rows_VD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Of `x_TD`."""
        return grad_TD.index_add_(0, ctx.saved_tensors[0], rows_VD), None


def take_rows(x_TD: Tensor, index_V: Tensor) -> tuple[Tensor, Tensor]:
    """`x_TD` and its image rows, both for `PLoRALinear.forward`: linears that read the same x share one gather."""
    return _TakeRows.apply(x_TD, index_V)


class _AddRows(torch.autograd.Function):
    """`y.index_add_(0, index, rows, alpha=scale)`, bitwise. torch's own keeps `rows` for a backward pass that needs their shape alone:
    in the 7B's pretraining those of all linears are 10 GiB.
    """

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, index_V: Tensor, rows_VD: Tensor, scale: float) -> Tensor:
        """`y_TD`, changed in place."""
        ctx.mark_dirty(y_TD)
        ctx.save_for_backward(index_V)
        ctx.scale = scale
        return y_TD.index_add_(0, index_V, rows_VD, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        """Of `y_TD` and `rows_VD`."""
        (index_V,) = ctx.saved_tensors
        rows_VD = grad_TD.index_select(0, index_V)
        return grad_TD, None, rows_VD if ctx.scale == 1 else rows_VD.mul_(ctx.scale), None


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
        """[T, out]. `x_TD` and `image_rows_VD` are those of `take_rows` where the caller shares it between linears that read the same x."""
        if self.mode is LowRankMode.none:
            return F.linear(x_TD, self.weight)
        if self.mode is LowRankMode.lora:
            return F.linear(x_TD, self.weight).add_(self._low_rank(x_TD), alpha=self.scale)
        if image_rows_VD is None:
            x_TD, image_rows_VD = take_rows(x_TD, image_index_V)
        delta_VD = self._low_rank(image_rows_VD)
        # In place: W's product is not needed for any gradient. index_add and not a mask: no dense second product, no host sync.
        return _AddRows.apply(F.linear(x_TD, self.weight), image_index_V, delta_VD, self.scale)

    def _low_rank(self, rows: Tensor) -> Tensor:
        return F.linear(F.linear(F.dropout(rows, self.dropout, self.training), self.plora_a), self.plora_b)
