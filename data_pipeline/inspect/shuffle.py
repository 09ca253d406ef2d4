"""How well samples are shuffled, measured against a uniform shuffle of the same sources.

Invariant: pure, and every measure has its reference drawn by the same counts, so that 1:1 means as good as uniform, whatever the sizes.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OneShard:
    """How a step's samples lie over shards."""

    pairs: float
    """Of two samples of one source, how likely both are from one shard."""
    largest: float
    """Largest share of the step's samples that is from one shard."""


def one_shard(shards: list[np.ndarray]) -> OneShard:
    """`shards`: by source, the shard of each of the step's samples."""
    same = pairs = largest = samples = 0
    for of_source in shards:
        counts = np.bincount(of_source)
        same += int((counts * (counts - 1)).sum())
        pairs += len(of_source) * (len(of_source) - 1)
        largest = max(largest, int(counts.max(initial=0)))
        samples += len(of_source)
    return OneShard(same / max(1, pairs), largest / max(1, samples))


def neighbour_distance(rows: np.ndarray, epochs: np.ndarray, steps: np.ndarray) -> tuple[float, int]:
    """Mean steps between samples that lie side by side on disk and are drawn in one epoch, and of how many such pairs.

    `rows`, `epochs`, `steps` [n] are those of a source's draws; a row comes once an epoch.
    """
    order = np.lexsort((rows, epochs))
    rows, epochs, steps = rows[order], epochs[order], steps[order]
    beside = (np.diff(rows) == 1) & (np.diff(epochs) == 0)
    distances = np.abs(np.diff(steps))[beside]
    return (float(distances.mean()), len(distances)) if len(distances) else (0.0, 0)
