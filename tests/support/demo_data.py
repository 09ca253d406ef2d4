"""The demo as a training run sees it: its `data` section, and batches taken apart into segments that can be compared."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig, ImageConfig, MixUnit, SourceConfig
from data_pipeline.loader import Loader, StepData
from data_pipeline.opened import Data, open_data
from data_pipeline.plan.balance import CostModel
from data_pipeline.plan.plan import Cursor
from data_pipeline.read.ledger import BadEntry

SEED = 3
COSTS = CostModel(token=10, attention=1, image=500)
START = Cursor(0, 0)


def data_config(root: Path, **changes: object) -> DataConfig:
    """One epoch of the three demo sources below `root`."""
    names = ("pairs", "documents", "text")
    settings: dict = {
        "tokenizer": str(root / "tokenizer"),
        "sources": {name: SourceConfig(str(root / name)) for name in names},
        "unit": MixUnit.epochs,
        "context": 256,
        "images_per_pack": 24,
        "segments_per_pack": 64,
        "global_batch": 8,
        "window": 2000,
        "images": ImageConfig(size=32, tokens=4),
        "workers": 0,
    }
    return DataConfig(**{**settings, **changes})


def run(config: DataConfig, rank: int = 0, ranks: int = 1, cursor: Cursor = START, step: int = 0) -> Iterator[StepData]:
    """The steps of one rank, with everything opened anew."""
    return iter(Loader(config, open_data(config, SEED), SEED, COSTS, rank, ranks, cursor, step))


def run_world(config: DataConfig, data: Data, ranks: int, cursor: Cursor, step: int) -> Iterator[tuple[StepData, ...]]:
    """The steps of all ranks of a world, side by side."""
    loaders = [Loader(config, data, SEED, COSTS, rank, ranks, cursor, step) for rank in range(ranks)]
    return zip(*loaders, strict=True)


def packs_of_step(parts: Iterable[StepData]) -> list[str]:
    """Digests of the tensors of each pack of a step, whichever rank had it; sorted. Micro-batches of one pack only."""
    batches = [m.batch for part in parts for m in part.micro_batches if any(m.request.packs)]
    return sorted(_digest(batch) for batch in batches)


def _digest(batch: PackedBatch) -> str:
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    held = [(n, v.dtype, v.shape, v.numpy().tobytes()) if isinstance(v, torch.Tensor) else (n, v) for n, v in values.items()]
    return hashlib.sha256(repr(held).encode()).hexdigest()


@dataclass(frozen=True)
class SegmentView:
    """What the model gets of one segment, by value."""

    source: int
    sample: int
    ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    """(position in the segment, token to predict)."""
    image_positions: tuple[int, ...]
    pixels: bytes


def segments_of(batch: PackedBatch) -> list[SegmentView]:
    """The segments of a batch but its padding."""
    borders = batch.cu_seqlens.tolist()
    targets = list(zip(batch.target_index.tolist(), batch.targets.tolist(), strict=True))[: batch.supervised]
    positions = batch.image_index.tolist() if batch.image_count else []
    tokens_an_image = len(positions) // max(1, batch.image_count)
    views = []
    for i, (first, last) in enumerate(itertools.pairwise(borders[:-1])):
        at = [n for n, p in enumerate(positions) if first <= p < last]
        images = sorted({n // tokens_an_image for n in at})
        views.append(
            SegmentView(
                int(batch.segment_source[i]),
                int(batch.segment_sample[i]),
                tuple(batch.input_ids[first:last].tolist()),
                tuple((t - first, token) for t, token in targets if first <= t < last),
                tuple(positions[n] - first for n in at),
                b"".join(batch.images[n].numpy().tobytes() for n in images),
            )
        )
    return views


def same_batch(a: PackedBatch, b: PackedBatch) -> bool:
    """Equal, tensor for tensor and bit for bit."""
    plain = [f.name for f in fields(a) if f.name not in a.tensors()]
    tensors = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return all(x.dtype == y.dtype and x.equal(y) for x, y in tensors) and all(getattr(a, n) == getattr(b, n) for n in plain)


def same_step(a: StepData, b: StepData) -> bool:
    """The same step with the same micro-batches and the same cursor behind it."""
    if (a.step, a.cursor, a.progress, len(a.micro_batches)) != (b.step, b.cursor, b.progress, len(b.micro_batches)):
        return False
    return all(same_batch(x.batch, y.batch) and x.bad == y.bad for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


def read_rank(config: DataConfig, rank: int, ranks: int) -> list[tuple[list[tuple[int, int, str]], list[BadEntry]]]:
    """One rank's whole run, to be called in a process of its own: by step its segments (source, row, digest) and what it dropped."""
    return [([digest(s) for m in step.micro_batches for s in segments_of(m.batch)], step.bad) for step in run(config, rank, ranks)]


def digest(segment: SegmentView) -> tuple[int, int, str]:
    """A segment with all its ids, targets and pixels, in short."""
    return segment.source, segment.sample, hashlib.sha256(repr(segment).encode()).hexdigest()
