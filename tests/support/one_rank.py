"""What writes and reads checkpoints without processes: one rank, and an engine of one weight."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_pipeline.plan.origin import Drawn, Origin
from train.checkpoint import TrainState, Writer
from train.config import CheckpointConfig
from train.engine import _copied
from train.ranks import Ranks


class Alone(Ranks):
    """One rank, without processes."""

    def in_background(self):
        return self

    def barrier(self):
        pass

    def share(self, value):
        return value

    def gather(self, value):
        return [value]


@dataclass
class Model:
    """An engine whose files are one weight."""

    weight: torch.Tensor = field(default_factory=lambda: torch.zeros(3))

    def snapshot(self, folder: Path, tag: str):
        return {folder / tag / "weight.pt": _copied(self.weight)}


def state(step: int, **changes) -> TrainState:
    drawn = Drawn(**{name: {} for name in Drawn.__dataclass_fields__})
    facts = {"plan_digest": "p", "base_digest": None, "world": 1, "zero_stage": 2, "dtype": "fp32", "guard": {}, **changes}
    return TrainState(step, (0, 0), drawn, Origin(), progress=0.5, totals={}, **facts)


def make(run, model, **config) -> Writer:
    return Writer(run, model, Alone(0, 1, 0, None), CheckpointConfig(**config))


def steps(run) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in run.checkpoints.glob("step-*"))
