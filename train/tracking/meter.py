"""Metrics without waiting: losses and moments stay on the device and are read and summed over ranks only every few steps.

Invariant: every step gets its own line with its global loss; no step asks the device for a value.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.tracking.stopwatch import PARTS, Laps
from train.tracking.trackers import Metrics

_RANKS = 1 << 20
"""More ranks than any run has: a time in microseconds and the rank that took it share one integer, so that a maximum names its rank."""


@dataclass
class _Pending:
    step: int
    host: Metrics
    sums_and_counts: Tensor
    """[2 * sources] fp64 of this rank: token losses and supervised tokens by source."""
    laps: Laps
    image_tokens: int
    memory: int


class Meter:
    """Holds the steps since the last flush."""

    def __init__(self, sources: list[str], rank: int, world: int) -> None:
        self._sources, self._rank, self._world = sources, rank, world
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: int, by_source: list[tuple[Tensor, Tensor]], host: Metrics, laps: Laps, image_tokens: int, memory: int) -> None:
        """Notes a step.

        Args:
            step: its number.
            by_source: (sums, counts) by source of each micro-batch.
            host: what the host knows already, the same on all ranks.
            laps: this rank's time.
            image_tokens: this rank's.
            memory: most bytes that this rank has used so far.
        """
        parts = [torch.cat([sums.double(), counts.double()]) for sums, counts in by_source]
        self._pending.append(_Pending(step, host, torch.stack(parts).sum(0), laps, image_tokens, memory))

    def flush(self) -> list[tuple[int, Metrics]]:
        """The held steps with their global losses. All ranks call it at the same step."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        losses = torch.stack([p.sums_and_counts for p in pending])
        dist.all_reduce(losses)
        rows = losses.tolist()  # the device has come to every moment now
        seconds = [p.laps.seconds() for p in pending]
        own = [[*(s[part] for part in PARTS), p.image_tokens] for s, p in zip(seconds, pending, strict=True)]
        totals = torch.tensor(own, dtype=torch.float64, device=losses.device)
        slow = [[round(s["forward"] * 1e6) * _RANKS + self._rank, p.image_tokens, p.memory] for s, p in zip(seconds, pending, strict=True)]
        most = torch.tensor(slow, dtype=torch.int64, device=losses.device)
        dist.all_reduce(totals)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        spread = [self._spread(*row) for row in zip(totals.tolist(), most.tolist(), strict=True)]
        return [(p.step, {**self._losses(row), **p.host, **more}) for p, row, more in zip(pending, rows, spread, strict=True)]

    def _losses(self, row: list[float]) -> Metrics:
        count = len(self._sources)
        sums, counts = row[:count], row[count:]
        metrics: Metrics = {"loss/train": sum(sums) / max(1.0, sum(counts))}
        for name, total, tokens in zip(self._sources, sums, counts, strict=True):
            if tokens:
                metrics[f"loss_by_source/{name}"] = total / tokens
                metrics[f"tokens_by_source/{name}"] = int(tokens)
        return metrics

    def _spread(self, totals: list[float], most: list[int]) -> Metrics:
        """Times as means over ranks, and how far the ranks lie apart. Forward is what ranks do alone (but for ZeRO-3, which gathers)."""
        *means, image_tokens = (total / self._world for total in totals)
        (slowest, rank), images, memory = divmod(most[0], _RANKS), most[1], most[2]
        forward = means[PARTS.index("forward")]
        return {
            **{f"throughput/{part}_s": mean for part, mean in zip(PARTS, means, strict=True)},
            "health/forward_max_over_mean": slowest / 1e6 / forward if forward else 1.0,
            "health/slowest_rank": rank,
            "health/image_tokens_max_over_mean": images / image_tokens if image_tokens else 1.0,
            "health/memory_gib": memory / 2**30,
        }
