"""Names of a DINOv2 as transformers has them, onto timm's.

Invariant: query, key and value are stacked in this order in timm's `qkv`; the position table is the only tensor that depends on the
image size.
"""

from data_pipeline.errors import UserError
from train.weights.clip import POSITIONS, VIT, stack
from train.weights.mapping import Entry, Shape, Shapes

CLASS = "embeddings.cls_token"
IGNORED = r"(embeddings\.mask_token|^(dinov2\.)?layernorm\.(weight|bias))$"
"""What DINOv2 holds and the tower has no use for: the token of masked patches, and the norm after the last block."""
STEM = {
    "cls_token": CLASS,
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
IN_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1": "layer_scale1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2": "layer_scale2",
}
QKV = ("query", "key", "value")


def entries(shapes: Shapes, architecture: str, prefix: str = "") -> list[Entry]:
    """Every weight of the tower.

    Raises:
        UserError: `architecture` (model.vision.name) has a weight that DINOv2 has not, or lacks one.
    """
    inside = {ours.removeprefix(VIT): shape for ours, shape in shapes.items() if ours.startswith(VIT)}
    foreign = [ours for ours in inside if not _names(ours, prefix)]
    lacking = [ours for ours in (*STEM, *(f"blocks.0.{ls}.gamma" for ls in ("ls1", "ls2"))) if ours not in inside]
    if foreign or lacking:
        what = f"it has {foreign[0]}" if foreign else f"it has no {lacking[0]}"
        raise UserError(f"model.vision.name: {architecture} is no DINOv2, {what} (use a vit_*_dinov2 architecture)")
    return [_entry(ours, shape, prefix) for ours, shape in inside.items()]


def _names(ours: str, prefix: str) -> list[str]:
    """Foreign names of one of timm's; none where DINOv2 has no such weight."""
    if ours in STEM:
        return [prefix + STEM[ours]]
    if not ours.startswith("blocks."):
        return []
    _, block, rest = ours.split(".", 2)
    layer = f"{prefix}encoder.layer.{block}."
    module, _, kind = rest.rpartition(".")
    if module == "attn.qkv":
        return [f"{layer}attention.attention.{part}.{kind}" for part in QKV]
    return [f"{layer}{IN_BLOCK[module]}.{'lambda1' if kind == 'gamma' else kind}"] if module in IN_BLOCK else []


def _entry(ours: str, shape: Shape, prefix: str) -> Entry:
    names = _names(ours, prefix)
    if len(names) == len(QKV):
        return Entry(VIT + ours, dict.fromkeys(names, (shape[0] // 3, *shape[1:])), stack, lambda stacked: list(stacked.chunk(3)))
    return Entry(VIT + ours, {names[0]: shape}, table=VIT + ours == POSITIONS)
