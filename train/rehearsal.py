"""The heaviest micro-batch that the budgets allow, and its run before the first step of a life: out of memory shows in the first minute.

Invariant: no real micro-batch has more tokens or more images; one with more targets has fewer images, and the head takes them in
chunks. Its run leaves nothing behind: its gradient is zero, and no weight, no optimizer state and no random number moves.
"""

from typing import TYPE_CHECKING

import torch

from data_pipeline.batch import IGNORE, L_BUCKET, PADDING_SOURCE, T_BUCKET, PackedBatch
from data_pipeline.config import DataConfig
from data_pipeline.errors import UserError

if TYPE_CHECKING:  # planning a run needs the batch, and no DeepSpeed
    from train.engine import Engine


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


def rehearse(engine: "Engine", batch: PackedBatch, device: torch.device) -> None:
    """Runs the batch forward and backward for nothing. All ranks call it, in every life: world size, GPU and settings may be others.

    Raises:
        UserError: memory does not hold it.
    """
    try:
        engine.rehearse(batch.to(device))
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said):  # what CPUs say, without a type
            raise
        raise UserError(
            f"out of memory on the heaviest pack that the budgets allow ({sum(batch.segment_lengths):,} tokens, {batch.image_count} "
            f"images): {said} (try train.checkpointing.kind=full, a higher deepspeed.stage, or a smaller data.context, "
            f"data.images_per_pack or data.micro_packs; xc-train plan shows what takes how much)"
        ) from None
