"""Names of InternLM2: the decoder's own, under other roofs.

Invariant: no tensor changes; `wqkv` is fused there as it is here.
"""

from train.weights.mapping import Entry, Shapes

IGNORED = r"rotary_emb\.inv_freq$"
"""A buffer that old versions of transformers saved."""


def entries(shapes: Shapes) -> list[Entry]:
    """Every base weight of decoder and head; PLoRA has none there."""
    return [Entry(ours, {name(ours): shape}) for ours, shape in shapes.items() if is_base(ours)]


def is_base(ours: str) -> bool:
    """Whether the parameter is one that a language model has too."""
    return ours.startswith(("decoder.", "head.")) and ".plora_" not in ours


def name(ours: str) -> str:
    """InternLM2's name of a parameter of decoder or head."""
    return ours.replace("head.", "output.", 1) if ours.startswith("head.") else ours.replace("decoder.", "model.", 1)
