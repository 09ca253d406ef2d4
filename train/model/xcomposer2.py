"""InternLM-XComposer2: embed the words, encode the images, project and place them, decode, compare with the targets.

Invariant: the same modules run for every batch, with or without images (a dummy image lands in the padding segment), and nothing
reads a tensor's value on the host. Fresh weights depend on the seed and on each parameter's name, on nothing else.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from train.config import Checkpointing
from train.model.attention import Segments
from train.model.decoder import Decoder, Head
from train.model.projector import Projector
from train.model.recompute import checkpoint_blocks
from train.model.vision import VisionTower
from train.model_config import ModelConfig


class Losses(NamedTuple):
    """What a forward pass returns. A named tuple: ZeRO-3 finds the tensors in it."""

    loss_sum: Tensor
    """fp32 scalar: the sum over the supervised targets, not yet normalised (train/objective.py)."""
    per_target_L: Tensor  # noqa: N815
    """[L] fp32, detached; 0 where the target is `IGNORE`."""


class XComposer2(nn.Module):
    """ViT, projector, InternLM2 with Partial LoRA, head.

    Construction leaves the weights without meaning (PLoRA and head are NaN): call `init_weights`, or load.
    """

    def __init__(self, config: ModelConfig, image_size: int, image_tokens: int | None = None) -> None:
        """`image_size` is `data.images.size` in pixels; `image_tokens`, where given, is `data.images.tokens` and must fit.

        Raises UserError where the numbers of the config do not fit together.
        """
        super().__init__()
        self.init_std = config.decoder.init_std
        self.vision = VisionTower(config.vision, image_size)
        projector = config.projector
        self.projector = Projector(
            self.vision.grid, self.vision.width, config.decoder.hidden, projector.merge, projector.marks, projector.standardise
        )
        self.decoder = Decoder(config.decoder, config.plora)
        self.head = Head(config.decoder)
        self._group: dist.ProcessGroup | None = None
        self.attention = "auto"
        """The decoder's backend as `train.attention` names it."""
        if image_tokens not in (None, self.projector.tokens):
            raise UserError(
                f"data.images.tokens is {image_tokens}, but an image of {image_size} pixels in patches of {config.vision.patch}, "
                f"merged {config.projector.merge} x {config.projector.merge}, makes {self.projector.tokens} tokens"
            )

    def apply_cost_settings(self, checkpointing: Checkpointing, compiled: bool = False, attention: str = "auto") -> None:
        """Activation checkpointing and compilation of the blocks of ViT and decoder, and the decoder's attention backend; to be called
        once, before training.
        """
        self.attention = attention
        for blocks in (self.vision.vit.blocks, self.decoder.layers):
            checkpoint_blocks(blocks, checkpointing)
            for block in blocks if compiled else ():
                block.compile()

    def share_tokens(self, group: dist.ProcessGroup | None) -> None:
        """The ranks with which parts of a batch (`shared_by` above 1) are run; whole batches need none."""
        self._group = group

    def forward(self, batch: PackedBatch) -> Losses:
        """The losses of one micro-batch, or of this rank's part of one: all ranks of the sequence group call it."""
        hidden_TD = self._hidden(batch)
        per_target_L = self.head(hidden_TD, batch.target_index, batch.targets)
        return Losses(per_target_L.sum(), per_target_L.detach())

    def logits(self, batch: PackedBatch) -> Tensor:
        """[L, vocab] fp32: what the model predicts at the target positions."""
        return self.head(self._hidden(batch), batch.target_index)

    def embed(self, batch: PackedBatch) -> Tensor:
        """[T, D]: embeddings of the words, with the image tokens in place."""
        words_TD = self.decoder.tok_embeddings(batch.input_ids)
        # Else every row is placed once, in order.
        chosen = self.projector.marks or batch.shared_by > 1 or len(batch.image_rows) != len(batch.images) * self.projector.tokens
        image_tokens_VD = self.projector(self.vision(batch.images), batch.image_rows if chosen else None)
        return words_TD.index_copy(0, batch.image_index, image_tokens_VD)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        x_TD = self.embed(batch)
        group = self._group if batch.shared_by > 1 else None
        segments = Segments.build(batch.segment_lengths, batch.cu_seqlens, x_TD.dtype, self.attention, group)
        return self.decoder(x_TD, batch.position_ids, segments, batch.image_index)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def init_weights(self, seed: int) -> None:
        """Fresh weights everywhere."""
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter, seed)

    @torch.no_grad()
    def init_weight(self, name: str, parameter: nn.Parameter, seed: int) -> None:
        """A fresh weight: matrices and tables N(0, init_std), biases and PLoRA's B zero, norms one.

        A is N(0, init_std) too, as it is in effect in the official code. With B zero the decoder starts as its base model.
        """
        if name.endswith(("plora_b", "bias", "feature_mean")):
            parameter.zero_()
        elif parameter.dim() > 1:
            # Drawn on the CPU in fp32: the same weights on every device and in every precision.
            fresh = torch.empty(parameter.shape).normal_(0.0, self.init_std, generator=_generator(seed, name))
            parameter.copy_(fresh)
        elif name.endswith("gamma"):  # LayerScale
            parameter.fill_(self.get_submodule(name.rpartition(".")[0]).init_values)
        else:
            parameter.fill_(1.0)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
