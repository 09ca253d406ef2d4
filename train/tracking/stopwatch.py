"""Where the time of a step goes, without waiting for the device.

Invariant: a moment is an event in the device's queue on GPUs, where the host runs ahead of the work, and a reading of the clock elsewhere;
moments are turned into seconds when the metrics are read, long after.
"""

import time
from dataclasses import dataclass, field

import torch

PARTS = ("data", "forward", "backward", "optimizer")
"""Waiting for batches and for the other ranks to have theirs; forward; backward with its reductions; the optimizer."""


@dataclass
class Laps:
    """The moments of one step, in order."""

    moments: list[tuple[str, "float | torch.cuda.Event"]] = field(default_factory=list)

    def seconds(self) -> dict[str, float]:
        """Time by part; 0 where a part did not occur. On GPUs, the device must have come to the last moment."""
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.moments, self.moments[1:], strict=False):
            found[part] += after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
        return found


class Stopwatch:
    """Marks the ends of parts."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._laps = Laps([("", self._now())])

    def lap(self, part: str) -> None:
        """What went on since the last call was this part."""
        self._laps.moments.append((part, self._now()))

    def laps(self) -> Laps:
        """The moments of the step so far."""
        return self._laps

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
