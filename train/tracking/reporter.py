"""Everything that a run tells about itself while it trains: metrics to trackers, the progress line.

Invariant: `flush` is a collective; all ranks call it at the same steps. Only rank 0 writes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from train.config import Config
from train.ranks import Ranks
from train.run_dir import RunDir
from train.tracking.captions import Caption
from train.tracking.meter import Meter, Own
from train.tracking.terminal import Terminal
from train.tracking.trackers import Metrics, Trackers


class Reporter:
    """The voice of a run; on ranks above 0 it only takes part in the sums."""

    def __init__(self, config: Config, run: RunDir, ranks: Ranks, terminal: Terminal, peak_flops: float | None) -> None:
        self._config, self._run, self._terminal = config, run, terminal
        self._meter = Meter(list(config.data.sources), ranks.rank, ranks.nodes(), peak_flops)
        self._trackers: Trackers | None = None
        self._captions: dict[int, Sequence[Caption]] = {}

    def begin(self, life: int, step: int, settings: dict[str, Any], lines: list[str]) -> None:
        """Says how the life begins, and opens the trackers. Rank 0 only."""
        for line in lines:
            self._terminal.say(line)
        self._trackers = Trackers(self._run, self._config, settings, life, step, self._terminal.say)

    def add(self, step: int, by_source: list[tuple[Tensor, Tensor]], host: Metrics, own: Own) -> None:
        """Notes a step, without waiting for the device; arguments as those of `Meter.add`."""
        self._meter.add(step, by_source, host, own)

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Notes what was written about held-out pictures after a step, to be shown behind its metrics: dashboards take steps in order."""
        if self._trackers is not None and captions:
            self._captions[step] = captions

    def flush(self) -> None:
        """Sums the noted steps over the ranks and shows them."""
        lines = self._meter.flush()
        if self._trackers is None or not lines:
            return
        for step, metrics in lines:
            self._trackers.log(step, metrics)
            if step in self._captions:
                self._trackers.show(step, self._captions.pop(step))
        step, metrics = lines[-1]
        speed = sum(m["throughput/tokens_per_s"] for _, m in lines) / len(lines)
        skipped, dropped = int(metrics["health/skipped_steps"]), int(metrics["health/bad_samples"])
        self._terminal.show(step, metrics["progress"], metrics["loss/train"], speed, skipped, dropped)

    def close(self) -> None:
        """Flushes the trackers and gives the terminal back."""
        if self._trackers is not None:
            self._trackers.close()
        self._terminal.close()
