"""What a step costs, in the units that balance packs over ranks.

Invariant: integers, so that all ranks compute the same table.
"""

from data_pipeline.plan.balance import CostModel
from train.config import Config


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
