"""Held-out losses while a run trains: captions behind the right image, a wrong one and none, and text alone.

Invariant: every rank runs the same number of batches, filled up with empty ones, since under ZeRO-3 ranks gather weights together; nothing
that training depends on moves: no dropout, no random number, no gradient.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.text.tokenizer import Tokenizer
from train.config import Config
from train.device import Device
from train.engine import Engine
from train.evaluate import BATCH_TOKENS, Scorer
from train.ranks import Ranks
from train.tracking.trackers import Metrics


class Validation:
    """The held-out segments of one rank, read once, when they are first needed."""

    def __init__(self, config: Config, tokenizer: Tokenizer, engine: Engine, ranks: Ranks, device: Device) -> None:
        self._config, self._tokenizer, self._engine, self._ranks, self._device = config, tokenizer, engine, ranks, device
        self._batches: dict[str, list[PackedBatch]] | None = None

    def due(self, step: int) -> bool:
        """Whether losses are measured after this step."""
        every = self._config.evaluate.every
        return bool(every) and step % every == 0

    def measure(self) -> Metrics:
        """Nats a token of every figure, over all ranks; all of them call it. Waits for the device."""
        if self._batches is None:
            self._batches = self._read()
        totals = torch.zeros(len(self._batches), 2, dtype=torch.float64, device=self._device.torch_device)
        with self._engine.scoring():
            for total, batches in zip(totals, self._batches.values(), strict=True):
                for batch in batches:
                    total[0] += self._engine.forward(batch.to(self._device.torch_device)).loss_sum
                    total[1] += batch.supervised
        dist.all_reduce(totals)
        found = {f"validation/{name}": nll / max(tokens, 1) for name, (nll, tokens) in zip(self._batches, totals.tolist(), strict=True)}
        for name in [name for name in found if name.endswith("/nll_right")]:
            split = name.removesuffix("nll_right")
            found[f"{split}wrong_minus_right"] = found[f"{split}nll_wrong"] - found[name]
        return found

    def _read(self) -> dict[str, list[PackedBatch]]:
        config = self._config.evaluate
        scorer = Scorer(self._engine.module, self._tokenizer, self._config)
        segments: dict[str, Sequence[Segment]] = {}
        for split, folder in config.splits.items():
            for figure, found in scorer.captions(split, Path(folder), config.pictures).items():
                segments[f"{split}/nll_{figure}"] = found
        if config.text:
            segments["text/nll"] = scorer.texts(Path(config.text))
        images, end = self._config.data.images, self._tokenizer.end
        return {
            name: [assemble(part, images.size, images.tokens, end) for part in share(found, self._ranks.rank, self._ranks.world)]
            for name, found in segments.items()
        }


def share(segments: Sequence[Segment], rank: int, world: int) -> list[Sequence[Segment]]:
    """The batches of one rank: each segment is one rank's, and all ranks have equally many batches, the last ones perhaps empty."""
    longest = max((len(segment.rendered.ids) for segment in segments), default=1)
    in_batch, in_rank = max(1, BATCH_TOKENS // longest), -(-len(segments) // world)
    own = segments[rank * in_rank : (rank + 1) * in_rank]
    return [own[first : first + in_batch] for first in range(0, in_rank, in_batch)]
