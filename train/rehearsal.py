"""The heaviest micro-batch that the budgets allow: what memory must hold.

Invariant: no real micro-batch has more tokens or more images; one with more targets has fewer images, and the head takes them in
chunks.
"""

import torch

from data_pipeline.batch import IGNORE, L_BUCKET, PADDING_SOURCE, T_BUCKET, PackedBatch
from data_pipeline.config import DataConfig


def heaviest_batch(config: DataConfig, with_images: bool) -> PackedBatch:
    """`micro_packs` packs, each one segment of `context` tokens with as many images as fit and every word supervised.

    `with_images`: whether any source can hold one. Bounds the work of the parts one by one (attention, ViT, head), which no real pack
    does at once.
    """
    packs, context, each = config.micro_packs, config.context, config.images.tokens
    images = min(config.images_per_pack, (context - 1) // each) if with_images else 0
    used = packs * context
    T = -(-(used + 1) // T_BUCKET) * T_BUCKET
    lengths = (*[context] * packs, T - used)
    starts = torch.arange(packs)[:, None] * context
    image_index = (starts + torch.arange(images * each)).flatten() if images else torch.full((each,), T - 1)
    words = (starts + torch.arange(images * each, context - 1)).flatten()
    L = -(-max(1, len(words)) // L_BUCKET) * L_BUCKET
    surplus = L - len(words)
    return PackedBatch(
        input_ids=torch.zeros(T, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        images=torch.zeros(max(1, packs * images), 3, config.images.size, config.images.size, dtype=torch.uint8),
        image_grid=torch.ones(max(1, packs * images), 2, dtype=torch.int64),
        image_index=image_index,
        image_rows=torch.arange(len(image_index)),
        target_index=torch.cat([words, torch.full((surplus,), T - 1)]),
        targets=torch.cat([torch.zeros(len(words), dtype=torch.int64), torch.full((surplus,), IGNORE)]),
        target_segment=torch.cat([words // context, torch.full((surplus,), packs)]),
        segment_source=torch.tensor([*[0] * packs, PADDING_SOURCE], dtype=torch.int32),
        segment_sample=torch.tensor([*[0] * packs, PADDING_SOURCE]),
        segment_lengths=lengths,
        supervised=len(words),
        image_count=packs * images,
        image_lengths=(each,) * max(1, packs * images),
    )
