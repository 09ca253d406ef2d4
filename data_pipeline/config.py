"""The `data` section of a config: what is read, how it is cut into packs, and in which proportions.

Every field that shapes a pack enters the plan digest (`data_pipeline.plan.plan.Plan.digest`); the others are cadence.
"""

from dataclasses import dataclass, field
from enum import Enum
from math import isqrt
from typing import Any

from omegaconf import MISSING

OVERHEAD = 2
"""Tokens of a segment beside its elements' own: begin and end. A piece that does not end its sample has no end token and stays one under
its count (data_pipeline/text/templates.py)."""


class MixUnit(Enum):
    """What the weights of `data.sources` count."""

    samples = "samples"  # weights are shares of samples
    tokens = "tokens"  # weights are shares of tokens, image tokens included
    epochs = "epochs"  # weights are epochs over the whole run, which then ends when the last epoch does


class ImageDecoder(Enum):
    """What turns an encoded image into pixels."""

    fast = "fast"  # JPEG by libjpeg-turbo and torch: quicker the larger the image, if `crop` is 0; rounding apart the same pixels
    pil = "pil"  # Pillow for every image: the reference


@dataclass
class ErrorConfig:
    """How much of a source a run may drop, because it cannot be read, before it stops with a checkpoint and exit code 70.

    May be changed when a run goes on.
    """

    share: float = 0.01
    """Largest share of dropped segments."""
    segments: int = 10_000
    """Stretch of the source's segments that `share` is counted over; each begins anew, and a run stops as soon as one is over it."""
    total: int | None = None
    """Largest number of dropped segments of the whole run; no limit by default."""


class Change(Enum):
    """What a run does with a checkpoint that was planned from another mix."""

    refuse = "refuse"  # the run ends before it starts
    repeat = "repeat"  # goes on with the new mix; the interrupted window is drawn again, its first packs come twice
    skip = "skip"  # goes on with the new mix; the rest of the interrupted window is left out


@dataclass
class PhaseConfig:
    """Weights that hold from a place in the run on."""

    at: str = MISSING
    """Share of `train.steps` that is done when the phase begins, above 0 and below 1; it begins with the next window."""
    weights: dict[str, str] = field(default_factory=dict)
    """New weights by source; sources that are not named keep theirs, 0 ends a source."""


@dataclass
class SourceConfig:
    """One source: a folder of shards with one kind of sample."""

    path: str = MISSING
    """Folder that holds the `*.tar` shards, or its URL: http(s)://, s3://, gs:// (docs/data.md)."""
    index_dir: str | None = None
    """Folder of the index where the shards' own folder is read-only or remote; beside the shards by default."""
    selection: str | None = None
    """Folder that `xc-data select` or `xc-data ledger` made of this source: only its samples are used. All usable ones by default."""
    weight: str = "1"
    """Share of this source in the mix, in `data.unit`; a decimal number, read exactly (0.1 is one tenth)."""
    errors: ErrorConfig = field(default_factory=ErrorConfig)
    """Error budget."""


class ImageRule(Enum):
    """How an image is brought to the ViT's square."""

    square = "square"  # resized to one square tile, whatever its shape
    partition = "partition"  # 4KHD: a global view and a grid of square tiles after its shape, with newlines and a separator


@dataclass
class ImageConfig:
    """How an image becomes tokens."""

    size: int = 490
    """Side of a square tile in pixels (paper: 490; composition: 224; 4KHD: 336)."""
    tokens: int = 1225
    """Tokens of one tile after patching and merging: (size / patch / merge) squared. A partitioned image of rows x columns tiles takes
    (rows x columns + 1) x tokens + 1 + (rows + 1) x sqrt(tokens)."""
    crop: float = 0.0
    """Augmentation: largest share of a side that a random crop removes. 0 = none, our default: the paper states none."""
    jitter: float = 0.0
    """Augmentation: largest relative change of brightness, contrast and saturation. 0 = none."""
    decoder: ImageDecoder = ImageDecoder.fast
    """`fast` or `pil`. Enters the plan digest, since it changes pixels."""
    policy: ImageRule = ImageRule.square
    """`square` or `partition`; `partition` needs `model.projector.marks`."""
    most_tiles: int = 25
    """Policy `partition`: most tiles of an image, its global view not counted; the larger, the finer images are seen. 25 is the most
    whose images fit the paper's context of 4096 (4KHD goes up to 55, with a context of 16384)."""

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest image: under `partition` all tiles one above the other, so that rows, and so newlines, are most."""
        if self.policy is ImageRule.square:
            return self.tokens
        return (self.most_tiles + 1) * (self.tokens + isqrt(self.tokens)) + 1


@dataclass
class DataConfig:
    """From shards to packed batches."""

    tokenizer: str = MISSING
    """Folder that holds `tokenizer.json`; its digest must be that of the index."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Sources by name; the names appear in metrics and in the ledger."""
    unit: MixUnit = MixUnit.samples
    """What the sources' weights count."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Changes of the weights in the course of a run of `train.steps`, in order; none where `unit` is epochs."""
    change: Change = Change.refuse
    """Whether a run may go on from a checkpoint with another mix (sources, unit, phases, global_batch, window), and how."""
    context: int = 4096
    """Token budget of a pack, and so the longest piece (paper: 4096)."""
    images_per_pack: int = 64
    """Image budget of a pack, in tiles."""
    segments_per_pack: int = 256
    """Segment budget of a pack."""
    global_batch: int = MISSING
    """Packs of one optimizer step."""
    micro_packs: int = 1
    """Packs that one rank runs forward and backward at once."""
    window: int = 65536
    """Draws that are packed together; 65,536 serves speed and shuffle (docs/data.md)."""
    images: ImageConfig = field(default_factory=ImageConfig)
    workers: int = 4
    """Decoding processes a rank; 0 decodes in the training process. Does not change the batches."""
    prefetch: int = 4
    """Micro-batches that each worker keeps ready; of a few pictures each, up to twice as many."""
    read_stall: float = 20.0
    """Remote shards: seconds without a byte after which a request is cut and sent again."""
    read_deadline: float = 300.0
    """Remote shards: seconds of failure after which the life ends with "try again" (exit code 75). No sample is dropped for it."""
    cache_dir: str | None = None
    """Remote shards: folder on a disk of the node that keeps what was read, shared by all ranks of the node. None = no cache."""
    cache_gib: float = 100.0
    """Size of the cache in GiB; what was used longest ago goes first."""


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass config as nested dictionaries of plain values, for digests and files."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]
