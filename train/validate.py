"""Held-out figures while a run trains: captions behind the right image, a wrong one and none, and text alone, against the weights that
the stage began from; and what the model writes about some pictures.

Invariant: every rank runs the same number of batches, filled up with empty ones, since under ZeRO-3 ranks gather weights together; nothing
that training depends on moves: no dropout, no random number, no gradient.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.read.images import Picture
from data_pipeline.text.tokenizer import Tokenizer
from train.config import Config, Stage
from train.device import Device
from train.engine import Engine
from train.evaluate import BATCH_TOKENS, Question, Scorer
from train.ranks import Ranks
from train.run_dir import RunDir, read_json, write_json
from train.tracking.captions import Caption
from train.tracking.trackers import Metrics

TEXT = "text/nll"
Asked = TypeVar("Asked", Segment, Question)


class Validation:
    """The held-out segments of one rank, read once, when they are first needed; of pictures, only those that it scores are decoded."""

    def __init__(self, config: Config, run: RunDir, tokenizer: Tokenizer, engine: Engine, ranks: Ranks, device: Device) -> None:
        self._config, self._engine, self._ranks, self._device = config, engine, ranks, device
        self._base_file = run.validation / "base.json"
        self._scorer = Scorer(engine.module, tokenizer, config)
        self._batches: dict[str, list[PackedBatch]] | None = None
        self._pictures: dict[str, list[tuple[dict[str, Any], Picture]]] | None = None
        self._base: float | None = None

    def due(self, step: int) -> bool:
        """Whether losses are measured after this step."""
        every = self._config.evaluate.every
        return bool(every) and step % every == 0

    def begin(self, step: int) -> None:
        """Measures the text with the weights that the stage begins from, before its first step; a later life reads what was found."""
        if not self._config.evaluate.every or not self._config.evaluate.text:
            return
        if step == 0:
            self._base = self._measured([TEXT])[TEXT]
            if self._ranks.rank == 0:
                self._base_file.parent.mkdir(exist_ok=True)
                write_json(self._base_file, {TEXT: self._base})
        else:
            found = self._ranks.share(read_json(self._base_file) if self._ranks.rank == 0 else None)
            self._base = found[TEXT] if found else None  # not known where the run began without these measurements

    def measure(self) -> Metrics:
        """Nats a token of every figure, over all ranks; all of them call it. Waits for the device."""
        found: Metrics = dict(self._measured(self._read()))
        for name in [name for name in found if name.endswith("/nll_right")]:
            split = name.removesuffix("nll_right")
            found[f"{split}wrong_minus_right"] = found[f"{split}nll_wrong"] - found[name]
        if TEXT in found and self._base is not None:
            found["text/minus_base"] = found[TEXT] - self._base
        return {f"validation/{name}": value for name, value in found.items()}

    def captions(self) -> list[Caption]:
        """What the model writes about some pictures of each split, the same on every rank; all of them call it."""
        if not self._config.evaluate.captions or self._config.run.stage is Stage.language:
            return []
        if self._pictures is None:
            splits = self._config.evaluate.splits.items()
            self._pictures = {name: self._scorer.pictures(name, Path(folder), self._config.evaluate.captions) for name, folder in splits}
        with self._engine.scoring():
            return [caption for name, pictures in self._pictures.items() for caption in self._scorer.write(name, pictures)]

    def _measured(self, names: Collection[str]) -> dict[str, float]:
        """Nats a token by figure."""
        batches = {name: found for name, found in self._read().items() if name in names}
        totals = torch.zeros(len(batches), 2, dtype=torch.float64, device=self._device.torch_device)
        with self._engine.scoring():
            for total, part in zip(totals, batches.values(), strict=True):
                for batch in part:
                    total[0] += self._engine.forward(batch.to(self._device.torch_device)).loss_sum
                    total[1] += batch.supervised
        dist.all_reduce(totals)
        return {name: nll / max(tokens, 1) for name, (nll, tokens) in zip(batches, totals.tolist(), strict=True)}

    def _read(self) -> dict[str, list[PackedBatch]]:
        """The batches of this rank by figure."""
        if self._batches is None:
            self._batches = self._batches_of(self._scorer)
        return self._batches

    def _batches_of(self, scorer: Scorer) -> dict[str, list[PackedBatch]]:
        config = self._config.evaluate
        rank, world = self._ranks.rank, self._ranks.world
        parts: dict[str, Sequence[Sequence[Segment]]] = {}
        for name, folder in config.splits.items():
            split = scorer.open(name, Path(folder))
            for figure, questions in scorer.questions(split, config.pictures).items():
                parts[f"{name}/nll_{figure}"] = [scorer.shown(split, part) for part in share(questions, rank, world)]
        if config.text:
            parts[TEXT] = share(scorer.texts(Path(config.text)), rank, world)
        images, end = self._config.data.images, scorer.tokenizer.end
        return {name: [assemble(part, images.size, images.tokens, end) for part in found] for name, found in parts.items()}


def share(segments: Sequence[Asked], rank: int, world: int) -> list[Sequence[Asked]]:
    """The batches of one rank: each segment is one rank's, and all ranks have equally many batches, the last ones perhaps empty."""
    longest = max((len(segment.rendered.ids) for segment in segments), default=1)
    in_batch, in_rank = max(1, BATCH_TOKENS // longest), -(-len(segments) // world)
    own = segments[rank * in_rank : (rank + 1) * in_rank]
    return [own[first : first + in_batch] for first in range(0, in_rank, in_batch)]
