"""The whole configuration tree: one dataclass a section, one YAML a stage, strict.

Invariant: no torch here; a resolved config is plain text that alone repeats the run. `slurm`, of a package above, is kept unread.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from data_pipeline.config import DataConfig
from train.model_config import ModelConfig


class Stage(Enum):
    """What a run is for. What learns is decided by `train.groups`; the stage says what is measured (language: no pictures), which models
    `xc-compose article` takes (sft, compose) and whose code an export names (compose).
    """

    language = "language"  # text alone: stands in for a pretrained decoder where none is given
    pretrain = "pretrain"  # ViT, projector and PLoRA learn to speak to a frozen decoder
    sft = "sft"  # everything learns
    compose = "compose"  # free-form text-image composition


class Precision(Enum):
    """Number format of weights and activations; optimizer state is fp32 always."""

    auto = "auto"  # bf16 where the device multiplies it fast (GPU, AMX, AVX-512 with bf16), else fp32
    bf16 = "bf16"
    fp32 = "fp32"


class Schedule(Enum):
    """The learning rate over the run, after the linear warm-up."""

    cosine = "cosine"  # half a cosine to `final_lr` (paper)
    constant = "constant"  # the peak to the end: for runs whose length is not settled
    wsd = "wsd"  # the peak, then a straight line to `final_lr` over the last `decay` of the run


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
    """Run directory whose final weights this stage starts from, or folder of a released InternLM-XComposer2 (docs/weights.md)."""
    deterministic: bool = False
    """Deterministic GPU kernels: resume is bitwise there too, at some cost. On CPUs it always is."""


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


class Recompute(Enum):
    """Which activations are computed again in the backward pass instead of being kept."""

    none = "none"  # all are kept
    full = "full"  # of a block only its input is kept
    every = "every"  # the same in one block of `every`
    ops = "ops"  # as `full`, but what fused attention kernels gave is kept too: they do not run twice


@dataclass
class Checkpointing:
    """Activation checkpointing of the blocks of ViT and decoder: memory for time. Losses and gradients stay the same."""

    kind: Recompute = Recompute.none
    """none, full, every or ops."""
    every: int = 2
    """With kind `every`: the first of each so many blocks is checkpointed; 1 is `full`."""


class Attention(Enum):
    """What computes attention inside segments; results differ by rounding."""

    auto = "auto"  # flash where it can be imported, else torch_varlen; sdpa on CPUs and in fp32
    flash = "flash"  # flash-attn 2: a GPU and bf16
    torch_varlen = "torch_varlen"  # torch.nn.attention.varlen: a GPU and bf16
    sdpa = "sdpa"  # torch's scaled_dot_product_attention, segments of like length together: everywhere


@dataclass
class TrainConfig:
    """How the weights move."""

    steps: int | None = None
    """Length of the run in optimizer steps; nothing where `data.unit: epochs` sets the length."""
    lr: float = MISSING
    """Peak learning rate (paper: 2e-4 for pretraining, 5e-5 for SFT)."""
    warmup: float = 0.01
    """Share of the run with linear warm-up (paper: 1 %)."""
    warmup_steps: int = 0
    """The same in steps: with `warmup: 0`, the rate rises to that of the schedule over the first so many."""
    schedule: Schedule = Schedule.cosine
    """cosine, constant or wsd; a function of the share of the run that is done, in steps or in data, whichever sets its length."""
    decay: float = 0.2
    """wsd: share of the run that the last decay takes."""
    final_lr: float = 0.0
    """Where cosine and wsd end, as a share of the peak (paper: 0)."""
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
    attention: Attention = Attention.auto
    """auto, flash, torch_varlen or sdpa; may be changed when a run goes on."""
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    """Activation checkpointing; may be changed when a run goes on."""
    compile: bool = False
    """torch.compile of each block of ViT and decoder: for GPUs, whose shapes repeat; not under ZeRO-3."""


@dataclass
class ParallelConfig:
    """How ranks share the work beside data parallelism."""

    sequence: int = 1
    """Ranks that share the tokens of the same packs and exchange heads around attention (Ulysses): for packs whose activations do not fit
    one GPU. A divisor of `model.decoder.kv_heads` and of the world size, at best the GPUs of a node; 1 = off. May change between lives."""


class OffloadTo(Enum):
    """Where something lies that does not fit a GPU."""

    none = "none"  # on the GPU
    cpu = "cpu"  # in the host's memory
    nvme = "nvme"  # on the disk that `nvme_path` names; weights under ZeRO-3 alone


@dataclass
class OffloadConfig:
    """What lies outside the GPUs: memory for time."""

    optimizer: OffloadTo = OffloadTo.none
    """Optimizer state, and its step: none or cpu; ZeRO-1 and above. nvme is refused: DeepSpeed 0.19.8 saves it and does not load it."""
    parameters: OffloadTo = OffloadTo.none
    """Weights between their uses: none, cpu or nvme (frozen weights on the disk, trained ones in host memory); ZeRO-3 alone."""
    nvme_path: str | None = None
    """Folder on a fast local disk of each node."""
    pin_memory: bool = True
    """Page-locked host memory: faster, and never swapped."""


@dataclass
class ZeroPPConfig:
    """ZeRO++: less traffic between nodes under ZeRO-3."""

    partition_ranks: int = 1
    """Ranks that hold a second copy of the weights among them, for the backward pass: the GPUs of a node; 1 = off."""
    quantized_weights: bool = False
    """Gathers weights in 8 bits."""
    quantized_gradients: bool = False
    """Reduces gradients in 4 bits; shapes the result."""


@dataclass
class DeepSpeedConfig:
    """The engine."""

    stage: int = 2
    """ZeRO stage 0 to 3."""
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    zero_pp: ZeroPPConfig = field(default_factory=ZeroPPConfig)
    extra: dict[str, Any] = field(default_factory=dict)
    """Overrides any key of the engine's own JSON, at any depth."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Complete checkpoints that stay; older ones are removed after a new one is complete."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for good; 0 = none."""


class GuardThen(Enum):
    """What follows too many skipped steps in a row."""

    stop = "stop"  # a checkpoint, and exit 70: a person must look
    rollback = "rollback"  # on with the weights of the last good checkpoint, behind the data since; once from each, then as `stop`


@dataclass
class GuardConfig:
    """Which steps move nothing. A loss or gradient that is not finite always skips its step, on all ranks alike."""

    in_a_row: int = 10
    """Skipped steps in a row that are too many; 0 = never."""
    then: GuardThen = GuardThen.stop
    """What happens then: stop or rollback."""
    sigma: float = 0.0
    """A loss so many deviations above the mean of the window is a spike and skips its step; 0 = spikes are let through. 6 is usual."""
    window: int = 128
    """Steps whose losses are the window; spikes are looked for once it is full."""


@dataclass
class WatchdogConfig:
    """Seconds that the slowest rank may be silent in a phase before the job shows its stacks and ends (exit 75); 0 = none; a collective
    still waits no longer than 30 minutes, under NCCL 10.
    """

    start: float = 1500.0
    """From the start of the processes to the end of the first step: weights, checkpoint, compilation."""
    data: float = 600.0
    """Waiting for the next step's batches, and for the other ranks to have theirs."""
    forward: float = 540.0
    """Forward, backward and optimizer step; less than NCCL's ten minutes, at which it ends the process without a word of where it was."""
    checkpoint: float = 1500.0
    """Writing a checkpoint or the final weights."""


@dataclass
class ProfileConfig:
    """A torch profiler trace in `RUN/profile`; a GPU's memory snapshot beside it."""

    steps: list[int] = field(default_factory=list)
    """First and last step that are recorded, such as [10, 15], by rank 0; empty = none."""


@dataclass
class TrackConfig:
    """Where metrics go; `metrics.jsonl` in the run directory is written always."""

    every: int = 10
    """Steps between two sums over the ranks: trackers then get a line for each of these steps, the terminal one for all of them."""
    tensorboard: bool = True
    wandb: bool = True
    """Weights & Biases; offline unless you are logged in."""
    project: str = "open-xcomposer"
    """Project in wandb."""


@dataclass
class EvaluateConfig:
    """What is measured with the final weights, on held-out sources; and, in part, while the run trains."""

    every: int = 0
    """Steps between measurements of the held-out losses while the run trains (`validation/` in the metrics); 0 = none."""
    pictures: int = 256
    """Most pictures a split that these measurements use, spread evenly over `candidates.json`."""
    captions: int = 0
    """Pictures a split that the model captions at each measurement, for trackers and report; 0 = none."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    slurm: dict[str, Any] = field(default_factory=dict)
    """Read by the slurm package alone."""
