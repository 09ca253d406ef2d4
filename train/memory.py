"""Bytes that a rank needs: weights, gradients and optimizer state under each ZeRO stage, and what waits for the backward pass.

Invariant: everything is computed from shapes and `requires_grad`, so that a model on the meta device will do.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError
from data_pipeline.part import part_of
from train.config import Checkpointing, Config, OffloadTo
from train.flops import Shape, trained
from train.model.decoder import CHUNK_LOGITS, Layer
from train.model.recompute import is_recomputed
from train.model.xcomposer2 import XComposer2
from train.model_config import LowRankMode

REDUCE_BUCKET = 500_000_000
"""Gradients that are reduced at once, DeepSpeed's default. ZeRO-1 and 2 allocate the bucket anew each step, whole: where the model is
smaller than the bucket, its pages were first touched again each step (on a CPU 8 % of the demo's step)."""
FP32 = 4
PERSISTENT = 100_000
"""ZeRO-3 keeps tensors of fewer numbers than this whole once they were gathered (`stage3_param_persistence_threshold`)."""
GATHERED = 1_000_000_000
"""Numbers that ZeRO-3 holds gathered at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device, and outside it where the engine offloads."""

    weights: int
    gradients: int
    optimizer: int
    """Moments and, where weights are no fp32 or are partitioned, their fp32 masters."""
    buffers: int
    """The bucket in which gradients wait to be summed over ranks; ZeRO-3 alone keeps it when the backward pass is over."""
    exchange: int
    """Copies of a bucket while it is summed: end to end, and in the format of the sum."""
    gathered: int
    """ZeRO-3: the weights of the largest block, whole while it runs."""
    activations: int
    """Kept for the backward pass of the heaviest micro-batch, with what its largest block needs while it runs."""
    offloaded: int
    """In the host's memory, or on its disk (nvme)."""

    @property
    def device(self) -> int:
        """All that lies on the device."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.offloaded


def require_trainable(stage: int, dtype: torch.dtype) -> None:
    """DeepSpeed without ZeRO knows no fp32 gradients of a bf16 model.

    Raises:
        UserError: that was asked for.
    """
    if stage == 0 and dtype is torch.bfloat16:
        raise UserError(
            "deepspeed.stage is 0, which would sum the gradients of bf16 weights in bf16 (use deepspeed.stage=1, or train.precision=fp32)"
        )


def moments(trained: int, config: Config, world: int) -> int:
    """Bytes of AdamW's two moments of `trained` numbers that a rank has on its device; the first step makes them."""
    if _offloads(config.deepspeed.offload.optimizer, _zero_extra(config).get("offload_optimizer", {})):
        return 0
    return 2 * FP32 * (-(-trained // world) if config.deepspeed.stage else trained)


def states(model: nn.Module, config: Config, world: int, dtype: torch.dtype) -> Memory:
    """Weights, gradients and optimizer state as DeepSpeed holds them between a backward pass and the step; no activations.

    Raises:
        UserError: see `require_trainable`.
    """
    stage, size, offload = config.deepspeed.stage, dtype.itemsize, config.deepspeed.offload
    zero = _zero_extra(config)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    whole = sum(p.numel() for p in parameters)
    part = -(-trained // world)
    require_trainable(stage, dtype)
    if stage == 0:
        return Memory(size * whole, FP32 * trained, moments(trained, config, world), 0, 0, 0, 0, 0)
    reduced = min(trained, int(zero.get("reduce_bucket_size", REDUCE_BUCKET)))
    summed = _summed_in(config)
    bucket, exchange = size * reduced, (size + (summed if summed != size else 0)) * reduced
    optimizer, gradients, weights, gathered, offloaded = 3 * FP32 * part, FP32 * part, size * whole, 0, 0
    if stage == 3:  # whose bucket is in the format of the sum
        bucket = exchange = summed * reduced
        small = sum(p.numel() for p in parameters if p.numel() < int(zero.get("stage3_param_persistence_threshold", PERSISTENT)))
        partitioned = size * -(-whole // world)
        node = int(zero.get("zero_hpz_partition_size", config.deepspeed.zero_pp.partition_ranks))
        if node > 1:  # ZeRO++'s second copy
            partitioned += size * -(-whole // node)
        weights = partitioned + size * small
        largest = max((sum(p.numel() for p in block.parameters()) for block in _gathered_together(model)), default=0)
        gathered = size * min(largest, int(zero.get("stage3_max_live_parameters", GATHERED)))
        if _offloads(offload.parameters, zero.get("offload_param", {})):
            weights, offloaded = size * small, partitioned
    if stage == 1:  # whole, and in bf16 as the backward pass gave them beside their fp32 sums
        gradients = (FP32 + (size if dtype is torch.bfloat16 else 0)) * trained
        bucket, exchange = 0 if dtype is torch.bfloat16 else bucket, (FP32 + (summed if summed != FP32 else 0)) * reduced
    if _offloads(offload.optimizer, zero.get("offload_optimizer", {})):
        offloaded += optimizer + gradients
        optimizer = gradients = 0
    return Memory(weights, gradients, optimizer, bucket, exchange, gathered, 0, offloaded)


def activations(model: XComposer2, shape: Shape, checkpointing: Checkpointing, dtype: torch.dtype) -> int:
    """Bytes kept for the backward pass of a micro-batch under a fused attention kernel, and the peak of its largest block."""
    size = dtype.itemsize
    vision_flows = trained(model.vision)
    decoder_flows = vision_flows or trained(model.projector) or trained(model.decoder)
    kept, largest = 0, 0
    for blocks, flows, cost in (
        (model.vision.vit.blocks, vision_flows, lambda block, mode: _vision_block(model, block, shape, mode)),
        (model.decoder.layers, decoder_flows, lambda block, mode: _decoder_layer(block, shape, mode)),
    ):
        for i, block in enumerate(blocks if flows else ()):
            mode = is_recomputed(checkpointing, i)
            kept += cost(block, mode)
            if mode != "none":
                largest = max(largest, cost(block, "none") - cost(block, mode))
    hidden = model.decoder.norm.weight.shape[0]
    linear_in, linear_out = model.projector.linear_in.weight, model.projector.linear_out.weight
    if vision_flows or trained(model.projector):
        kept += shape.image_tokens * (linear_in.shape[1] + linear_in.shape[0] + linear_out.shape[1])
    kept += shape.tokens * hidden * 2 + shape.targets * hidden
    vocab = model.head.weight.shape[0]
    rows = min(shape.targets, max(1, CHUNK_LOGITS // vocab))
    # In the backward pass of a chunk: logits and their gradient in fp32, and the gradient in the model's format.
    return size * (kept + largest) + rows * vocab * (2 * FP32 + size)


def of_run(model: XComposer2, config: Config, world: int, dtype: torch.dtype, batch: PackedBatch) -> Memory:
    """Everything that a rank needs for this micro-batch, or for the heaviest part of it (`parallel.sequence`)."""
    shared = config.parallel.sequence
    shapes = [Shape.of(part_of(batch, rank, shared, config.data.images.tokens)) for rank in range(shared)]
    most = max(activations(model, shape, config.train.checkpointing, dtype) for shape in shapes)
    return replace(states(model, config, world, dtype), activations=most)


def _decoder_layer(layer: Layer, shape: Shape, mode: str) -> int:
    """Numbers that a layer keeps."""
    T, attention, ffn = shape.tokens, layer.attention, layer.feed_forward
    D, F, width = layer.ffn_norm.weight.shape[0], ffn.w1.weight.shape[0], attention.wo.weight.shape[1]
    if mode != "none":
        return T * D + (T * width if mode == "ops" else 0)
    linears = (attention.wqkv, attention.wo, ffn.w1, ffn.w3, ffn.w2)
    low_rank = 0
    for linear in linears if attention.wo.mode is not LowRankMode.none else ():
        V = shape.image_tokens if linear.mode is LowRankMode.plora else T
        own_input = linear.mode is LowRankMode.plora and linear is not ffn.w3  # w1 and w3 share their gathered rows
        inputs = linear.weight.shape[1] * (own_input + 2 * (linear.dropout > 0))
        low_rank += V * (linear.plora_a.shape[0] + inputs)
    qkv = attention.wqkv.weight.shape[0]
    trained = linears[0].weight.requires_grad
    norms = 2 * T * D * (1 + layer.ffn_norm.weight.requires_grad + trained)
    exchanged = width if shape.shared_by > 1 and trained else 0  # what wo reads is then another tensor than what attention made
    return norms + T * (qkv + width + exchanged + 2 * F + (F if trained else 0)) + low_rank


def _vision_block(model: XComposer2, block: nn.Module, shape: Shape, mode: str) -> int:
    """Numbers that a ViT block keeps; QuickGELU keeps its sigmoid besides."""
    tokens = shape.images * (model.vision.grid**2 + model.vision.vit.num_prefix_tokens)
    width, inner = model.vision.width, block.mlp.fc1.weight.shape[0]
    if mode != "none":
        return tokens * width * (2 if mode == "ops" else 1)
    quick = not isinstance(block.mlp.act, nn.GELU)
    return tokens * (9 * width + inner * (2 + quick))


def _gathered_together(model: nn.Module) -> list[nn.Module]:
    """Blocks whose weights ZeRO-3 has at once: those of the ViT and the decoder, and each other part."""
    if not isinstance(model, XComposer2):
        return [model]
    return [*model.vision.vit.blocks, *model.decoder.layers, model.decoder.tok_embeddings, model.head, model.projector]


def _zero_extra(config: Config) -> dict[str, Any]:
    """What `deepspeed.extra` says of ZeRO."""
    return config.deepspeed.extra.get("zero_optimization", {})


def _summed_in(config: Config) -> int:
    """Bytes of a number in which ranks sum gradients: 4, but where a setting says otherwise (train/engine.py)."""
    quantized = _zero_extra(config).get("zero_quantized_gradients", config.deepspeed.zero_pp.quantized_gradients)
    wanted = config.deepspeed.extra.get("communication_data_type")
    return FP32 if (wanted or ("fp16" if quantized else "fp32")) == "fp32" else 2


def _offloads(typed: OffloadTo, extra: dict[str, Any] | None) -> bool:
    """Whether something leaves the device: by `deepspeed.offload`, unless `deepspeed.extra` says otherwise; null switches it off."""
    return extra is not None and extra.get("device", typed.value) != "none"
