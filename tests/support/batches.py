"""Hand-made batches and a tiny model for tests of the model.

Invariant: batches keep the contract of `data_pipeline/batch.py`: the last segment is padding, and a batch without images carries a
dummy image whose features land there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.batch import IGNORE, PADDING_SOURCE, PackedBatch
from train.model.xcomposer2 import XComposer2
from train.model_config import DecoderConfig, ModelConfig, PLoRAConfig, ProjectorConfig, VisionConfig

VOCAB = 97
IMAGE_SIZE = 32
IMAGE_TOKENS = 4

Segment = Sequence[list[int] | Tensor]
"""Elements in order: token ids, or an image [3, H, W] uint8."""


def tiny_config() -> ModelConfig:
    """Three query heads a key head; weights large enough for attention, rotation and image to matter in the sixth digit."""
    return ModelConfig(
        vision=VisionConfig("vit_tiny_patch16_224", 16, overrides={"embed_dim": 32, "depth": 3, "num_heads": 2}),
        projector=ProjectorConfig(merge=1),
        decoder=DecoderConfig(vocab=VOCAB, hidden=48, layers=2, heads=6, kv_heads=2, ffn=64, rope_theta=1e4, init_std=0.2),
        plora=PLoRAConfig(rank=4, alpha=8.0, dropout=0.0),
    )


def tiny_model(seed: int = 0, trained_plora: bool = True) -> XComposer2:
    """`trained_plora` gives PLoRA's B values as training would."""
    model = XComposer2(tiny_config(), IMAGE_SIZE, IMAGE_TOKENS)
    model.init_weights(seed)
    if trained_plora:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("plora_b"):
                parameter.data.normal_(0, 0.2, generator=generator)
    return model


def image(seed: int) -> Tensor:
    """A random image."""
    return torch.randint(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int) -> list[int]:
    """Random token ids from 2 on."""
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(segments: Sequence[Segment], sources: Sequence[int] | None = None, round_tokens: int = 16) -> PackedBatch:
    """Packs the segments; every text token that follows something in its segment is supervised."""
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    images: list[Tensor] = []
    image_index: list[int] = []
    target_index: list[int] = []
    target_segment: list[int] = []
    for number, elements in enumerate(segments):
        start = len(ids)
        for element in elements:
            if isinstance(element, Tensor):
                images.append(element)
                image_index += range(len(ids), len(ids) + IMAGE_TOKENS)
                ids += [1] * IMAGE_TOKENS
                continue
            rows = range(max(len(ids), start + 1) - 1, len(ids) + len(element) - 1)
            target_index += rows
            target_segment += [number] * len(rows)
            ids += element
        lengths.append(len(ids) - start)
        positions += range(lengths[-1])
    image_count, supervised, used = len(images), len(target_index), len(ids)
    padding = round_tokens - used % round_tokens
    if not images:
        images.append(torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8))
        image_index += [used + padding - 1] * IMAGE_TOKENS
    targets = [ids[row + 1] for row in target_index]
    surplus = -supervised % 8 or 8
    sources = list(range(len(segments))) if sources is None else list(sources)
    lengths.append(padding)
    return PackedBatch(
        input_ids=torch.tensor(ids + [0] * padding),
        position_ids=torch.tensor(positions + list(range(padding))),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        images=torch.stack(images),
        image_grid=torch.ones(len(images), 2, dtype=torch.int64),
        image_index=torch.tensor(image_index),
        image_rows=torch.arange(len(image_index)),
        target_index=torch.tensor(target_index + [used] * surplus),
        targets=torch.tensor(targets + [IGNORE] * surplus),
        target_segment=torch.tensor(target_segment + [len(segments)] * surplus),
        segment_source=torch.tensor([*sources, PADDING_SOURCE], dtype=torch.int32),
        segment_sample=torch.tensor([*range(len(segments)), PADDING_SOURCE]),
        segment_lengths=tuple(lengths),
        supervised=supervised,
        image_count=image_count,
        image_lengths=(IMAGE_TOKENS,) * len(images),
    )


def mixed_segments() -> list[Segment]:
    """Pairs, interleaved documents, text; short and long, one of a single token."""
    return [
        [image(0), text(6, 0)],
        [text(3, 1), image(1), text(5, 2), image(2), text(2, 3)],
        [text(23, 4)],
        [text(1, 5)],
        [image(3), text(9, 6)],
    ]
