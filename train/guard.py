"""The guard: a step whose loss or gradient cannot be trusted moves nothing, on all ranks alike, and its samples are written down.

Invariant: the verdict on a loss stays on the device. All ranks compute it from the same sum; where it is bad, the loss of the step's last
micro-batch becomes NaN, and the engine, which reads the norm of the gradient in any case, leaves weights and optimizer as they were. So
the common path waits for nothing, and no rank can differ from another.

    RUN/skipped/rank-N.jsonl   a line a skipped step: why, where its data begins, the samples that this rank had in it
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline import jsonl
from data_pipeline.batch import PackedBatch
from data_pipeline.loader import StepData
from data_pipeline.shards.source import ShardSource
from train.config import GuardConfig


class Window(NamedTuple):
    """Losses of the last steps that were believed, on the device."""

    losses_W: Tensor  # noqa: N815
    """fp64; a ring, filled from the front."""
    believed: Tensor
    """int64 scalar: how many were believed in all."""

    @staticmethod
    def empty(size: int, device: torch.device) -> "Window":
        """Of a run that starts."""
        return Window(torch.zeros(size, dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device))


def judge(window: Window, loss: Tensor, sigma: float) -> tuple[Tensor, Window]:
    """Whether the loss of a step is believed (bool scalar), and the window after it; no host sync.

    It is not where it is not finite, or where it lies more than `sigma` deviations above the mean of a full window. `sigma` 0 believes
    every finite loss. What is not believed leaves the window as it was, so that a run that diverges is not believed step by step.
    """
    W = len(window.losses_W)
    limit = window.losses_W.mean() + sigma * window.losses_W.std(correction=0)
    spikes = (loss > limit) & (window.believed >= W) if sigma else torch.zeros_like(loss, dtype=torch.bool)
    ok = torch.isfinite(loss) & ~spikes
    place = (window.believed % W).reshape(1)
    filled_W = window.losses_W.scatter(0, place, loss.reshape(1))
    return ok, Window(torch.where(ok, filled_W, window.losses_W), window.believed + ok)


class Guard:
    """Judges steps and remembers how many in a row moved nothing."""

    def __init__(self, config: GuardConfig, run_dir: Path, rank: int, device: torch.device, saved: dict[str, Any]) -> None:
        """`saved` is what `state` of an earlier life returned; empty at the start of a run."""
        self._config = config
        self._file = run_dir / "skipped" / f"rank-{rank}.jsonl"
        self._window = Window.empty(config.window, device)
        losses = saved.get("losses", [])
        if len(losses) == config.window:  # else the window was configured anew and fills again
            self._window = Window(
                self._window.losses_W + self._window.losses_W.new_tensor(losses), self._window.believed + saved["believed"]
            )
        self._loss: Tensor | None = None
        self.in_a_row = int(saved.get("in_a_row", 0))
        """Skipped steps since the last one that moved the weights."""

    def judged_last(self, step: StepData) -> list[PackedBatch]:
        """The step's batches, those without a target first: `factor` acts on the last one's gradient, and an empty place has none."""
        return sorted((m.batch for m in step.micro_batches), key=lambda batch: batch.supervised > 0)

    def factor(self, loss_sums: Sequence[Tensor], n_global: int) -> Tensor | None:
        """What the loss of the step's last micro-batch is multiplied by: 1, or NaN where the step is not to count. No host sync.

        All ranks call it, once a step, with the loss sums of all their micro-batches. Nothing where spikes are let through: a loss
        that is not finite makes a gradient that is not, without help.
        """
        if not self._config.sigma:
            return None
        total = torch.stack([loss_sum.double() for loss_sum in loss_sums]).sum()
        dist.all_reduce(total)
        self._loss = total / max(n_global, 1)
        ok, self._window = judge(self._window, self._loss, self._config.sigma)
        return torch.where(ok, 1.0, math.nan).float()

    def after(self, step: StepData, began: tuple[int, int], skipped: bool, grad_norm: float, sources: Sequence[ShardSource]) -> None:
        """Counts the step; of a skipped one, writes down why and which samples of this rank were in it.

        Args:
            step: what this rank had.
            began: cursor where the step's data begins.
            skipped: the engine moved nothing.
            grad_norm: as the engine read it.
            sources: of the run, in its order.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": step.step + 1, "reason": self._reason(), "grad_norm": str(grad_norm), "window": began[0], "pack": began[1]}
        jsonl.append(self._file, [{**line, "samples": _samples(step, sources)}])

    def exhausted(self) -> bool:
        """Whether too many steps in a row moved nothing."""
        return self.in_a_row >= self._config.in_a_row > 0

    def state(self) -> dict[str, Any]:
        """For the checkpoint; waits for the device."""
        return {"in_a_row": self.in_a_row, "losses": self._window.losses_W.tolist(), "believed": int(self._window.believed)}

    def _reason(self) -> str:
        """Reads the device: a skipped step may wait."""
        if self._loss is None:
            return "a loss or a gradient was not finite"
        loss, losses_W = float(self._loss), self._window.losses_W
        if not math.isfinite(loss):
            return f"the loss was {loss}"
        if int(self._window.believed) >= len(losses_W) and loss > float(losses_W.mean() + self._config.sigma * losses_W.std(correction=0)):
            return f"the loss spiked to {loss:.4g}: the last {len(losses_W)} were {losses_W.mean():.4g} +- {losses_W.std(correction=0):.2g}"
        return "a gradient was not finite"


def _samples(step: StepData, sources: Sequence[ShardSource]) -> list[dict[str, Any]]:
    """Each sample of the step once, with the shard and the key that `xc-data` commands take."""
    rows = {
        (int(source), int(row)): None
        for micro_batch in step.micro_batches
        for source, row in zip(micro_batch.batch.segment_source, micro_batch.batch.segment_sample, strict=True)
        if source >= 0
    }
    return [{"source": sources[s].name, "shard": sources[s].locate(row).shard.name, "key": sources[s].key(row)} for s, row in rows]
