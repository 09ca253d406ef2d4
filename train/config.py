"""The whole configuration tree: one dataclass a section, one YAML a stage, strict.

Invariant: no torch here; a resolved config is plain text that alone repeats the run. Sections of packages above `train` are kept
but not read (`slurm`).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from data_pipeline.config import DataConfig


class Stage(Enum):
    """What a run is for; it decides nothing by itself, the groups do."""

    language = "language"  # text alone: stands in for a pretrained decoder where none is given
    pretrain = "pretrain"  # ViT, projector and PLoRA learn to speak to a frozen decoder
    sft = "sft"  # everything learns
    compose = "compose"  # free-form text-image composition


class Precision(Enum):
    """Number format of weights and activations; optimizer state is fp32 always."""

    auto = "auto"  # bf16 where the device multiplies it fast (GPU, AMX), else fp32
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class RunConfig:
    """What the run is called and where it leaves its things."""

    name: str = MISSING
    """Name in dashboards."""
    dir: str = MISSING
    """Run directory: everything that the stage leaves."""
    stage: Stage = MISSING
    """language, pretrain, sft or compose."""
    seed: int = 0
    """Seed of weights, data order, augmentation and dropout."""
    init_from: str | None = None
    """Run directory whose final weights this stage starts from; nothing = fresh weights."""
    deterministic: bool = False
    """Deterministic GPU kernels: resume is bitwise there too, at some cost. On CPUs it always is."""


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


@dataclass
class ProjectorConfig:
    """Linear, GELU, Linear from image features to the decoder's width."""

    merge: int = 1
    """Side of the square of neighbouring patches that are concatenated into one image token (paper: 1; 4KHD: 2)."""
    marks: bool = False
    """Learned newline and separator embeddings between the tokens of an image, which data.images.policy `partition` places (4KHD)."""


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
    init_std: float = 0.02
    """Deviation of fresh weights."""


@dataclass
class PLoRAConfig:
    """Partial LoRA: low-rank weights of every decoder linear that act on image tokens only."""

    rank: int = 256
    """Rank R (paper: 256)."""
    alpha: float = 256.0
    """The product is scaled by alpha / rank (paper: 1.0)."""
    dropout: float = 0.05
    """Dropout on the low-rank input, image tokens only (official code: 0.05)."""


@dataclass
class ModelConfig:
    """ViT, projector, decoder, PLoRA; the defaults are InternLM-XComposer2-VL-7B."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    plora: PLoRAConfig = field(default_factory=PLoRAConfig)


@dataclass
class GroupRule:
    """One rule of `train.groups`; the first rule whose pattern matches a parameter's name decides about it."""

    match: str = MISSING
    """Regular expression, searched in the parameter's name."""
    trainable: bool = True
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    weight_decay: float | None = None
    """Replaces `train.weight_decay`; norms and biases never decay."""
    layer_decay: float = 1.0
    """Layer-wise decay: the factor per block counted from the top (paper: 0.90 for the ViT)."""


@dataclass
class TrainConfig:
    """How the weights move."""

    steps: int | None = None
    """Length of the run in optimizer steps; nothing where `data.unit: epochs` sets the length."""
    lr: float = MISSING
    """Peak learning rate (paper: 2e-4 for pretraining, 5e-5 for SFT)."""
    warmup: float = 0.01
    """Share of the run with linear warm-up (paper: 1 %)."""
    final_lr: float = 0.0
    """Where the cosine ends, as a share of the peak (paper: 0)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW (official fine-tuning code: beta2 0.95)."""
    eps: float = 1e-8
    weight_decay: float = 0.1
    """AdamW's decay (official fine-tuning code: 0.1)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    groups: list[GroupRule] = field(default_factory=list)
    """Ordered rules, first match wins; a parameter that no rule matches is an error."""
    precision: Precision = Precision.auto


@dataclass
class DeepSpeedConfig:
    """The engine."""

    stage: int = 2
    """ZeRO stage 0 to 3."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Overrides any key of the engine's own JSON."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Complete checkpoints that stay; older ones are removed after a new one is complete."""


@dataclass
class TrackConfig:
    """Where metrics go; `metrics.jsonl` in the run directory is written always."""

    every: int = 10
    """Steps between lines for the trackers and the terminal."""
    tensorboard: bool = True
    wandb: bool = True
    """Weights & Biases; offline unless you are logged in."""
    project: str = "open-xcomposer"
    """Project in wandb."""


@dataclass
class EvaluateConfig:
    """What is measured with the final weights, on held-out sources."""

    splits: dict[str, str] = field(default_factory=dict)
    """Held-out pair sources by name; each is a folder with shards, index and `candidates.json`."""
    text: str | None = None
    """Held-out plain-text source: what the decoder's language costs."""
    samples: int = 12
    """Held-out pictures a split whose greedy captions are kept for the report: the first by SHA-256 of the key."""


@dataclass
class Config:
    """One stage."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    slurm: dict[str, Any] = field(default_factory=dict)
    """Read by the slurm package alone."""
