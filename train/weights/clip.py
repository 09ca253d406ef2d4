"""Names of CLIP's vision tower as transformers has them, onto timm's.

Invariant: query, key and value are stacked in this order in timm's `qkv`; the position table is the only tensor that depends on the
image size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from train.weights.mapping import Entry, Shape, Shapes

VIT = "vision.vit."
POSITIONS = f"{VIT}pos_embed"
IGNORED = r"(embeddings\.position_ids|post_layernorm\.(weight|bias)|^text_.*|^visual_projection\.weight|^logit_scale)$"
"""What CLIP holds and the tower has no use for: a buffer of old versions, the norm after the last block, the text side."""
STEM = {
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "norm_pre.weight": "pre_layrnorm.weight",
    "norm_pre.bias": "pre_layrnorm.bias",
}
IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def entries(shapes: Shapes, architecture: str, prefix: str = "vision_model.") -> list[Entry]:
    """Every weight of the tower.

    Raises:
        UserError: `architecture` (model.vision.name) has a weight that CLIP's tower has not, or lacks one.
    """
    inside = {ours.removeprefix(VIT): shape for ours, shape in shapes.items() if ours.startswith(VIT)}
    foreign = [ours for ours in inside if _names(ours, prefix) is None]
    lacking = [ours for ours in ("cls_token", "pos_embed", *STEM) if ours not in inside]
    if foreign or lacking:
        what = f"it has {foreign[0]}" if foreign else f"it has no {lacking[0]}"
        raise UserError(
            f"model.vision.name: {architecture} is not CLIP's tower, {what}: its weights have no names in a CLIP folder "
            "(use a *_clip_quickgelu_* architecture)"
        )
    return [_entry(ours, shape, prefix) for ours, shape in inside.items()]


def _names(ours: str, prefix: str) -> list[str] | None:
    """Foreign names of one of timm's, or None where CLIP has no such weight."""
    if ours == "cls_token":
        return [f"{prefix}embeddings.class_embedding"]
    if ours == "pos_embed":
        return [f"{prefix}embeddings.position_embedding.weight"]
    if ours in STEM:
        return [prefix + STEM[ours]]
    if not ours.startswith("blocks."):
        return None
    _, block, rest = ours.split(".", 2)
    layer = f"{prefix}encoder.layers.{block}."
    module, _, kind = rest.rpartition(".")
    if module == "attn.qkv":
        return [f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"]
    return [f"{layer}{IN_BLOCK[module]}.{kind}"] if module in IN_BLOCK else None


def _entry(ours: str, shape: Shape, prefix: str) -> Entry:
    names = _names(ours, prefix) or []
    if ours in ("cls_token", "pos_embed"):
        table = ours == "pos_embed"
        bare = shape[1:] if table else shape[2:]
        return Entry(VIT + ours, {names[0]: bare}, lambda parts: parts[0].view(1, -1, shape[-1]), lambda p: [p.view(-1, *bare[1:])], table)
    if len(names) == 3:
        return Entry(VIT + ours, dict.fromkeys(names, (shape[0] // 3, *shape[1:])), stack, lambda stacked: list(stacked.chunk(3)))
    return Entry(VIT + ours, {names[0]: shape})


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Query, key and value, one below the other."""
    return torch.cat(list(parts))
