"""The `model` section of a stage's configuration.

Invariant: no torch here, as in train/config.py; the defaults are InternLM-XComposer2-VL-7B.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


@dataclass
class VisionConfig:
    """The vision tower: a timm ViT, features of one block, not normed, CLS dropped."""

    name: str = "vit_large_patch14_clip_quickgelu_336"
    """Architecture by its timm name (paper: CLIP ViT-L/14)."""
    patch: int = 14
    """Side of a patch in pixels; must be that of the architecture."""
    block: int = -1
    """Which block's output is used, counted as Python does (paper: the last)."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments that replace the architecture's own, such as embed_dim, depth, num_heads."""
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    """Mean of RGB in 0..1 that images are normalised with (CLIP)."""
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    """Deviation of RGB in 0..1 (CLIP)."""
    weights: str | None = None
    """Hugging Face folder of a CLIP or DINOv2 whose tower this stage starts from; nothing = fresh weights, or those of run.init_from."""


@dataclass
class ProjectorConfig:
    """Linear, GELU, Linear from image features to the decoder's width."""

    merge: int = 1
    """Side of the square of neighbouring patches that are concatenated into one image token (paper: 1; 4KHD: 2)."""
    marks: bool = False
    """Learned newline and separator embeddings between the tokens of an image, which data.images.policy `partition` places (4KHD)."""
    standardise: bool = False
    """Image features first lose their mean and are divided by their deviation, channel by channel: those of training pictures, which
    model.vision.weights holds as `features.mean` and `features.std` (examples/small/small_features.py measures them; paper: no)."""


class RopeKind(Enum):
    """How rotary positions reach beyond the length that the decoder was trained at."""

    none = "none"  # they do not
    linear = "linear"  # positions are divided by `factor`
    dynamic = "dynamic"  # NTK: theta grows with the segment's length once that exceeds `max_positions`


@dataclass
class RopeScaling:
    """`rope_scaling` of the released configs."""

    kind: RopeKind = RopeKind.none
    """none, linear or dynamic."""
    factor: float = 1.0
    """Scaling factor."""


@dataclass
class DecoderConfig:
    """InternLM2; the defaults are the 7B."""

    vocab: int = 92544
    """Rows of the embedding and of the head."""
    hidden: int = 4096
    """Model width D."""
    layers: int = 32
    heads: int = 32
    """Query heads N; the head size H is hidden / heads."""
    kv_heads: int = 8
    """Key and value heads K."""
    ffn: int = 14336
    """Inner width of the SwiGLU feed-forward."""
    rms_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_positions: int = 32768
    """Positions that the decoder was trained at; dynamic scaling begins beyond them."""
    init_std: float = 0.02
    """Deviation of fresh weights."""
    weights: str | None = None
    """Hugging Face folder of an InternLM2 or a Llama that this stage starts from; nothing = fresh weights, or those of run.init_from."""


class LowRankMode(Enum):
    """Which tokens the low-rank weights act on."""

    plora = "plora"  # image tokens only (the paper)
    lora = "lora"  # all tokens, for ablations
    none = "none"  # there are no low-rank weights, for ablations


@dataclass
class LowRank:
    """Low-rank weights of one kind of linear."""

    rank: int = MISSING
    alpha: float = MISSING


@dataclass
class PLoRAConfig:
    """Partial LoRA: low-rank weights of every decoder linear that act on image tokens only."""

    mode: LowRankMode = LowRankMode.plora
    """plora, or for ablations lora or none."""
    rank: int = 256
    """Rank R (paper: 256)."""
    alpha: float = 256.0
    """The product is scaled by alpha / rank (paper: 1.0)."""
    dropout: float = 0.05
    """Dropout on the low-rank input, image tokens only (official code: 0.05)."""
    linears: dict[str, LowRank] = field(default_factory=dict)
    """Rank and alpha by linear (wqkv, wo, w1, w3, w2) where they differ (released 4KHD weights: wqkv 8 and 16)."""


@dataclass
class ModelConfig:
    """ViT, projector, decoder, PLoRA; the defaults are InternLM-XComposer2-VL-7B."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    plora: PLoRAConfig = field(default_factory=PLoRAConfig)
