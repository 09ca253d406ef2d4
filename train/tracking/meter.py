"""Metrics without waiting: losses stay on the device and are read and summed over ranks only every few steps.

Invariant: every step gets its own line with its global loss; no step asks the device for a value.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.tracking.trackers import Metrics


@dataclass
class _Pending:
    step: int
    host: Metrics
    sums_and_counts: Tensor
    """[2 * sources] fp64 of this rank: token losses and supervised tokens by source."""


class Meter:
    """Holds the steps since the last flush."""

    def __init__(self, sources: list[str]) -> None:
        self._sources = sources
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: int, by_source: list[tuple[Tensor, Tensor]], host: Metrics) -> None:
        """Notes a step: (sums, counts) by source of each micro-batch, and what the host knows already."""
        parts = [torch.cat([sums.double(), counts.double()]) for sums, counts in by_source]
        self._pending.append(_Pending(step, host, torch.stack(parts).sum(0)))

    def flush(self) -> list[tuple[int, Metrics]]:
        """The held steps with their global losses. All ranks call it at the same step."""
        if not self._pending:
            return []
        totals = torch.stack([p.sums_and_counts for p in self._pending])
        dist.all_reduce(totals)
        pending, self._pending = self._pending, []
        return [(p.step, {**self._losses(row), **p.host}) for p, row in zip(pending, totals.tolist(), strict=True)]

    def _losses(self, row: list[float]) -> Metrics:
        count = len(self._sources)
        sums, counts = row[:count], row[count:]
        metrics: Metrics = {"loss/train": sum(sums) / max(1.0, sum(counts))}
        for name, total, tokens in zip(self._sources, sums, counts, strict=True):
            if tokens:
                metrics[f"loss_by_source/{name}"] = total / tokens
                metrics[f"tokens_by_source/{name}"] = int(tokens)
        return metrics
