"""The ordinary way of a training step, as the reference of benchmarks/step.py: padded batches, PLoRA by a boolean mask on every
linear, full logits in fp32, attention under a dense mask.

Invariant: it computes the same loss from the same weights, and stays as it is: what is measured against it may change, it may not.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.decoder import Attention, FeedForward, Rotation
from train.model.plora import PLoRALinear
from train.model.xcomposer2 import XComposer2

FACTORS = ("padding", "mask", "logits", "attention")
IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """An image of `image_tokens` tokens, then words; the words from `answer` on are supervised."""

    ids: Tensor
    """[n] int64."""
    pixels: Tensor
    """[3, H, W] uint8."""
    image_tokens: int
    answer: int


class Ordinary:
    """Called, it gives the sum of the token losses of all samples; `without` leaves factors of its cost out, one or more."""

    def __init__(self, model: XComposer2, samples: list[Sample], without: frozenset[str] = frozenset()) -> None:
        self.model, self.samples, self.without = model, samples, without

    def __call__(self) -> Tensor:
        """The loss: of one padded batch, or without padding of one sample after another."""
        if "padding" in self.without:
            return torch.stack([self._loss([sample]) for sample in self.samples]).sum()
        return self._loss(self.samples)

    def _loss(self, samples: list[Sample]) -> Tensor:
        model, B, T = self.model, len(samples), max(len(s.ids) for s in samples)
        ids, labels = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), IGNORE)
        is_image, is_real = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
        for i, sample in enumerate(samples):
            n = len(sample.ids)
            ids[i, :n], is_real[i, :n], is_image[i, : sample.image_tokens] = sample.ids, True, True
            labels[i, sample.answer : n] = sample.ids[sample.answer :]
        images = model.projector(model.vision(torch.stack([s.pixels for s in samples])))
        words = model.decoder.tok_embeddings(ids)
        x = words.masked_scatter(is_image[..., None].expand_as(words), images)
        visible = torch.ones(T, T, dtype=torch.bool).tril() & is_real[:, None, None, :]
        visible |= torch.eye(T, dtype=torch.bool)  # a padding row sees itself, or its softmax would be NaN
        rotation = Rotation.of(torch.arange(T), (T,), model.decoder.config, x.dtype)
        for layer in model.decoder.layers:
            x = x + self._attend(layer.attention, layer.attention_norm(x), rotation, visible, is_image)
            x = x + self._feed_forward(layer.feed_forward, layer.ffn_norm(x), is_image)
        x, targets = model.decoder.norm(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if "logits" in self.without:
            x, targets = x[targets != IGNORE], targets[targets != IGNORE]
        return F.cross_entropy(F.linear(x, model.head.weight).float(), targets, ignore_index=IGNORE, reduction="sum")

    def _linear(self, linear: PLoRALinear, x: Tensor, is_image: Tensor) -> Tensor:
        if "mask" in self.without:
            rows = torch.nonzero(is_image.flatten()).squeeze(1)
            return linear(x.flatten(0, 1), rows).view(*x.shape[:2], -1)
        y = F.linear(x, linear.weight)
        y[is_image] += linear.scale * F.linear(F.linear(x[is_image], linear.plora_a), linear.plora_b)
        return y

    def _attend(self, attention: Attention, x: Tensor, rotation: Rotation, visible: Tensor, is_image: Tensor) -> Tensor:
        B, T, _ = x.shape
        g, K, H = attention.queries_per_key, attention.kv_heads, attention.head_size
        qkv = self._linear(attention.wqkv, x, is_image).view(B, T, K, g + 2, H)
        qk, v = qkv.split((g + 1, 1), dim=3)
        q, k = Rotation(rotation.cos[None], rotation.sin[None]).apply(qk).split((g, 1), dim=3)
        q = q.reshape(B, T, K * g, H).transpose(1, 2)
        k, v = (y.expand(B, T, K, g, H).reshape(B, T, K * g, H).transpose(1, 2) for y in (k, v))
        if "attention" in self.without:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # padding comes last: causality hides it
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self._linear(attention.wo, out.transpose(1, 2).reshape(B, T, K * g * H), is_image)

    def _feed_forward(self, ffn: FeedForward, x: Tensor, is_image: Tensor) -> Tensor:
        gate = self._linear(ffn.w1, x, is_image)
        return self._linear(ffn.w2, F.silu(gate) * self._linear(ffn.w3, x, is_image), is_image)
