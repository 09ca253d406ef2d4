"""Names of the Llama family: query, key and value fused into `wqkv`, tied heads copied.

Invariant: rows of wqkv are, per key head, its query heads, the key, the value; rotary halves are the same in both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from train.model_config import DecoderConfig
from train.weights.internlm2 import is_base
from train.weights.mapping import Entry, Shapes

TIED = r"^lm_head\.weight$"
"""Saved by some beside the embeddings that it equals."""
NAMES = {
    "decoder.tok_embeddings.weight": "model.embed_tokens.weight",
    "decoder.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
IN_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}


def entries(shapes: Shapes, decoder: DecoderConfig, tied: bool) -> list[Entry]:
    """Every base weight of decoder and head; `tied`: the head is the embedding table."""
    return [_entry(ours, shape, decoder, tied) for ours, shape in shapes.items() if is_base(ours)]


def _entry(ours: str, shape: tuple[int, ...], decoder: DecoderConfig, tied: bool) -> Entry:
    if ours in NAMES:
        return Entry(ours, {NAMES["decoder.tok_embeddings.weight" if tied and ours == "head.weight" else ours]: shape})
    _, _, layer, inside = ours.split(".", 3)
    if inside != "attention.wqkv.weight":
        return Entry(ours, {f"model.layers.{layer}.{IN_LAYER[inside]}": shape})
    H, K, D = decoder.hidden // decoder.heads, decoder.kv_heads, decoder.hidden
    rows = {"q": decoder.heads * H, "k": K * H, "v": K * H}
    theirs = {f"model.layers.{layer}.self_attn.{part}_proj.weight": (count, D) for part, count in rows.items()}
    return Entry(ours, theirs, lambda parts: _fuse(parts, K), lambda fused: _unfuse(fused, K, H))


def _fuse(parts: Sequence[Tensor], K: int) -> Tensor:
    return torch.cat([part.unflatten(0, (K, -1)) for part in parts], dim=1).flatten(0, 1)


def _unfuse(fused: Tensor, K: int, H: int) -> list[Tensor]:
    groups = fused.unflatten(0, (K, -1))
    return [part.flatten(0, 1) for part in groups.split((groups.shape[1] - 2 * H, H, H), dim=1)]
