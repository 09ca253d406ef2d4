"""Metrics without waiting: losses and moments stay on the device and are read and summed over ranks only every few steps.

Invariant: every step gets its own line with its global loss; no step asks the device for a value.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.tracking.stopwatch import PARTS, Laps
from train.tracking.trackers import Metrics

_RANKS = 1 << 20
"""More ranks than any run has: a time in microseconds and the rank that took it share one integer, so that a maximum names its rank."""


@dataclass(frozen=True)
class Own:
    """What a rank knows of its own part of a step."""

    laps: Laps
    image_tokens: int
    memory: int
    """Most bytes that it has used so far."""
    model_flops: int
    """What the model asks for."""
    hardware_flops: int
    """What runs: padding and recomputation included."""


@dataclass
class _Pending:
    step: int
    host: Metrics
    sums_and_counts: Tensor
    """[2 * sources] fp64 of this rank: token losses and supervised tokens by source."""
    own: Own


class Meter:
    """Holds the steps since the last flush."""

    def __init__(self, sources: list[str], rank: int, nodes: Sequence[str], peak_flops: float | None) -> None:
        """`nodes`: the node of each rank; `peak_flops` of a rank's device, a second; nothing where it is not known."""
        self._sources, self._rank, self._world, self._peak = sources, rank, len(nodes), peak_flops
        self._ranks_of, self._node = Counter(nodes), nodes[rank]
        self._pending: list[_Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: int, by_source: list[tuple[Tensor, Tensor]], host: Metrics, own: Own) -> None:
        """Notes a step: (sums, counts) by source of each micro-batch, what the host knows already on all ranks, and this rank's part."""
        parts = [torch.cat([sums.double(), counts.double()]) for sums, counts in by_source]
        self._pending.append(_Pending(step, host, torch.stack(parts).sum(0), own))

    def flush(self) -> list[tuple[int, Metrics]]:
        """The held steps with their global losses. All ranks call it at the same step."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        losses = torch.stack([p.sums_and_counts for p in pending])
        dist.all_reduce(losses)
        rows = losses.tolist()  # the device has come to every moment now
        sums, most_of = [], []
        for own in (p.own for p in pending):
            seconds = own.laps.seconds()
            sums.append([*seconds.values(), own.image_tokens, own.model_flops, own.hardware_flops])
            most_of.append([round(seconds["forward"] * 1e6) * _RANKS + self._rank, own.image_tokens, own.memory])
        totals = torch.tensor(sums, dtype=torch.float64, device=losses.device)
        most = torch.tensor(most_of, dtype=torch.int64, device=losses.device)
        dist.all_reduce(totals)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        step_s = [float(p.host["throughput/step_s"]) for p in pending]
        spread = [self._spread(*row) for row in zip(totals.tolist(), most.tolist(), step_s, strict=True)]
        lines = [(p.step, {**self._losses(row), **p.host, **more}) for p, row, more in zip(pending, rows, spread, strict=True)]
        lines[-1][1].update(self._by_node([own[PARTS.index("forward")] for own in sums], losses.device))
        return lines

    def _by_node(self, forward_s: list[float], device: torch.device) -> Metrics:
        """Seconds of a forward pass as means over the held steps and a node's ranks: a node that is slow stands out. Of several nodes."""
        if len(self._ranks_of) == 1:
            return {}
        own = sum(forward_s) / len(forward_s) / self._ranks_of[self._node]
        means = torch.tensor([own * (node == self._node) for node in self._ranks_of], dtype=torch.float64, device=device)
        dist.all_reduce(means)
        return {f"health/forward_s_by_node/{node}": mean for node, mean in zip(self._ranks_of, means.tolist(), strict=True)}

    def _losses(self, row: list[float]) -> Metrics:
        count = len(self._sources)
        sums, counts = row[:count], row[count:]
        metrics: Metrics = {"loss/train": sum(sums) / max(1.0, sum(counts))}
        for name, total, tokens in zip(self._sources, sums, counts, strict=True):
            if tokens:
                metrics[f"loss_by_source/{name}"] = total / tokens
                metrics[f"tokens_by_source/{name}"] = int(tokens)
        return metrics

    def _spread(self, totals: list[float], most: list[int], step_s: float) -> Metrics:
        """Times as means over ranks, and how far the ranks lie apart.

        Forward is what ranks do alone, but for the gathers of ZeRO-3 and the exchange of heads under `parallel.sequence`.
        """
        *means, image_tokens, model, hardware = (total / self._world for total in totals)
        (slowest, rank), images, memory = divmod(most[0], _RANKS), most[1], most[2]
        forward = means[PARTS.index("forward")]
        peak = {"throughput/mfu": model / step_s / self._peak, "throughput/hfu": hardware / step_s / self._peak} if self._peak else {}
        return {
            **{f"throughput/{part}_s": mean for part, mean in zip(PARTS, means, strict=True)},
            "throughput/tflops_per_rank": model / step_s / 1e12,
            **peak,
            "health/forward_max_over_mean": slowest / 1e6 / forward if forward else 1.0,
            "health/slowest_rank": rank,
            "health/image_tokens_max_over_mean": images / image_tokens if image_tokens else 1.0,
            "health/memory_gib": memory / 2**30,
        }
