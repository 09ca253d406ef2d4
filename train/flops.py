"""What a step costs: floating-point operations counted from the batch itself, and the coefficients that balance packs over ranks.

Invariant: a product is counted as often as it runs. A frozen weight costs no gradient of its own, and what lies below everything
trainable no gradient at all; so no rule of thumb (6 x parameters x tokens) enters. Integers, so that all ranks compute the same.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from data_pipeline.batch import PackedBatch
from data_pipeline.plan.balance import CostModel
from train.config import Checkpointing, Config
from train.model.plora import PLoRALinear
from train.model.recompute import is_recomputed
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRankMode

PEAKS = {
    **{"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12},
    **{"H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12},
    **{"B200": 2250e12, "GB200": 2500e12, "L40S": 362e12},
}
"""Dense bf16 FLOP/s of GPUs by words of their names, from NVIDIA's data sheets; the first that is found counts."""


@dataclass(frozen=True)
class Shape:
    """What of a micro-batch decides its cost."""

    lengths: tuple[int, ...]
    """Tokens of each segment."""
    images: int
    image_tokens: int
    targets: int
    shared_by: int = 1
    """Ranks of a sequence group: tokens and heads are shared out evenly; images, image tokens and targets are those of one part."""

    @staticmethod
    def of(batch: PackedBatch) -> "Shape":
        """What runs: padding, rounded-up targets and a dummy image included."""
        return Shape(batch.segment_lengths, len(batch.images), len(batch.image_index), len(batch.targets), batch.shared_by)

    @staticmethod
    def useful(batch: PackedBatch) -> "Shape":
        """What the data asked for."""
        image_tokens = len(batch.image_index) if batch.image_count else 0
        tiles = len(batch.images) if batch.image_count else 0
        return Shape(batch.segment_lengths[:-1], tiles, image_tokens, batch.supervised)

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return sum(self.lengths) // self.shared_by

    def counts(self) -> dict[str, int]:
        """How often each unit of `Product` occurs."""
        pairs = sum(n * (n + 1) // 2 for n in self.lengths) // self.shared_by  # causal, inside segments
        return {"token": self.tokens, "pair": pairs, "image": self.images, "image_token": self.image_tokens, "target": self.targets}


class Flops(NamedTuple):
    """Floating-point operations; a multiply-add is two."""

    forward: int
    backward: int
    recomputed: int
    """Forward again, for activation checkpointing."""

    @property
    def model(self) -> int:
        """What the model asks for: the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What runs: the numerator of HFU."""
        return self.model + self.recomputed


class Product(NamedTuple):
    """A matrix product that runs forward with the rows of a micro-batch: what it costs for each `unit` of them."""

    part: str
    """vision, projector, decoder, plora, head or attention."""
    unit: str
    """What its rows count: token, image, image_token, target; pair: two tokens of a segment of which one sees the other."""
    forward: int
    backward: int
    recomputed: int


@dataclass(frozen=True)
class StepCost:
    """The products of a model: what is frozen, trained and checkpointed is decided."""

    products: tuple[Product, ...]
    chunk_rows: int
    """Targets up to which the head keeps its logits; above it computes them twice."""

    @staticmethod
    def of(model: XComposer2, checkpointing: Checkpointing) -> "StepCost":
        """Reads shapes and `requires_grad`; the model may lie on the meta device, but not under ZeRO-3, which empties weights."""
        return StepCost(tuple(_Walk(checkpointing).products_of(model)), model.head.chunk_rows)

    def by_part(self, shape: Shape, chunked: int | None = None) -> dict[str, Flops]:
        """The cost of a micro-batch, forward and backward, by part of the model; of several as one shape where `chunked` is given.

        `chunked`: targets whose logits are computed twice, which are those of micro-batches with more than `chunk_rows`.
        """
        counts = shape.counts()
        if chunked is None:
            chunked = shape.targets if shape.targets > self.chunk_rows else 0
        found: dict[str, list[int]] = {}
        for product in self.products:
            total = found.setdefault(product.part, [0, 0, 0])
            for i, each in enumerate((product.forward, product.backward, product.recomputed)):
                total[i] += counts[product.unit] * each
            if product.unit == "target" and product.backward:
                total[2] += chunked * product.forward
        return {part: Flops(*total) for part, total in found.items()}

    def total(self, shape: Shape) -> Flops:
        """The cost of a micro-batch, forward and backward."""
        return Flops(*(sum(each) for each in zip(*self.by_part(shape).values(), strict=True)))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, where we know it."""
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", device_name)), None)


def cost_model(config: Config) -> CostModel:
    """Forward FLOPs of a token, of a pair of tokens of a segment, and of an image, in units of 2 x hidden.

    ViT blocks cost 12 width^2 a patch (attention inside an image is small beside that); the projector is left out.
    """
    decoder, vision = config.model.decoder, config.model.vision
    head = decoder.hidden // decoder.heads
    qkvo = decoder.hidden * (2 * decoder.hidden + 2 * decoder.kv_heads * head)
    linears = decoder.layers * (qkvo + 3 * decoder.hidden * decoder.ffn)
    patches = (config.data.images.size // vision.patch) ** 2
    width, depth = _vision_size(config)
    return CostModel(token=linears // decoder.hidden, attention=decoder.layers, image=patches * depth * 12 * width**2 // decoder.hidden)


def _vision_size(config: Config) -> tuple[int, int]:
    """Width and blocks of the ViT: the overrides, else ViT-L's."""
    overrides = config.model.vision.overrides
    return int(overrides.get("embed_dim", 1024)), int(overrides.get("depth", 24))


class _Walk:
    """Goes through the model in the order of its forward pass and remembers whether a gradient flows there."""

    def __init__(self, checkpointing: Checkpointing) -> None:
        self._checkpointing = checkpointing
        self._flows = False

    def products_of(self, model: XComposer2) -> list[Product]:
        vit, decoder = model.vision.vit, model.decoder
        found = []
        patches, tokens = model.vision.grid**2, model.vision.grid**2 + vit.num_prefix_tokens
        size = vit.patch_embed.proj.weight.numel()
        found.append(self._product("vision", "image", patches * size, vit.patch_embed.proj.weight.requires_grad, False, "none"))
        self._flows = any(p.requires_grad for n, p in vit.named_parameters() if not n.startswith("blocks."))
        for i, block in enumerate(vit.blocks):
            found += self._vision_block(block, tokens, is_recomputed(self._checkpointing, i))
        for linear in (model.projector.linear_in, model.projector.linear_out):
            found.append(self._linear("projector", "image", linear, model.projector.tokens, "none"))
        self._flows |= decoder.tok_embeddings.weight.requires_grad
        for i, layer in enumerate(decoder.layers):
            found += self._decoder_layer(layer, is_recomputed(self._checkpointing, i))
        self._flows |= trained(decoder.norm)
        found.append(self._product("head", "target", model.head.weight.numel(), model.head.weight.requires_grad, self._flows, "none"))
        return found

    def _vision_block(self, block: nn.Module, tokens: int, mode: str) -> list[Product]:
        found = []
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                found.append(self._linear("vision", "image", module, tokens, mode))
                if name == "attn.qkv":
                    found.append(self._attention("image", tokens**2 * module.out_features // 3, mode))
            elif not list(module.children()):
                self._flows |= trained(module)
        return found if self._flows else [p._replace(recomputed=0) for p in found]

    def _decoder_layer(self, layer: nn.Module, mode: str) -> list[Product]:
        attention, ffn = layer.attention, layer.feed_forward
        self._flows |= trained(layer.attention_norm)
        found = self._plora(attention.wqkv, mode)
        found.append(self._attention("pair", attention.wo.weight.shape[1], mode))
        found += self._plora(attention.wo, mode)
        self._flows |= trained(layer.ffn_norm)
        flows = self._flows
        found += self._plora(ffn.w1, mode)
        after, self._flows = self._flows, flows  # w1 and w3 read the same input
        found += self._plora(ffn.w3, mode)
        self._flows |= after
        found += self._plora(ffn.w2, mode)
        return found if self._flows else [p._replace(recomputed=0) for p in found]

    def _plora(self, linear: PLoRALinear, mode: str) -> list[Product]:
        found = [self._product("decoder", "token", linear.weight.numel(), linear.weight.requires_grad, self._flows, mode)]
        if linear.mode is not LowRankMode.none:
            a, b = linear.plora_a, linear.plora_b
            unit = "image_token" if linear.mode is LowRankMode.plora else "token"
            low_rank_flows = self._flows or a.requires_grad
            found += [
                self._product("plora", unit, a.numel(), a.requires_grad, self._flows, mode),
                self._product("plora", unit, b.numel(), b.requires_grad, low_rank_flows, mode),
            ]
        self._flows |= trained(linear)
        return found

    def _linear(self, part: str, unit: str, linear: nn.Linear, times: int, mode: str) -> Product:
        found = self._product(part, unit, times * linear.weight.numel(), linear.weight.requires_grad, self._flows, mode)
        self._flows |= trained(linear)
        return found

    def _product(self, part: str, unit: str, size: int, weight: bool, inputs: bool, mode: str) -> Product:
        return Product(part, unit, 2 * size, 2 * size * (weight + inputs), 2 * size if mode != "none" else 0)

    def _attention(self, unit: str, size: int, mode: str) -> Product:
        """Queries with keys, weights with values: two products of pairs x width. A fused kernel's own recomputation is not counted.

        Mode `ops` keeps what it gave; the plain products of short segments on a CPU are run again all the same.
        """
        return Product("attention", unit, 4 * size, 8 * size if self._flows else 0, 4 * size if mode == "full" else 0)


def trained(module: nn.Module) -> bool:
    """Whether any of its parameters is."""
    return any(p.requires_grad for p in module.parameters())
