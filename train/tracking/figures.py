"""What the host knows of a step without asking the device, as metrics.

Invariant: names are grouped by prefix (`throughput/`, `optim/`, `data/`, `health/`), so that dashboards fall into sections by themselves;
steps, tokens and samples are all in each line, so that each can be the x axis.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data_pipeline.opened import Data
from train.config import Config
from train.tracking.trackers import Metrics

if TYPE_CHECKING:
    from train.checkpoint import TrainState
    from train.loop import Counts


class Figures:
    """Turns counts and times of steps into metrics; knows what lives before this one took."""

    def __init__(self, config: Config, data: Data, lr_scales: Mapping[str, float], lived_s: float) -> None:
        """`lr_scales` by rule of `train.groups`; `lived_s` is the wall time of the lives before."""
        self._capacity = config.data.global_batch * config.data.context
        self._rows = {source.name: source.facts.kept for source in data.sources}
        self._lr_scales = lr_scales
        self._lives_began = time.monotonic() - lived_s

    def of_step(
        self, counts: "Counts", state: "TrainState", seconds: float, waited: float, lr: float, grad_norm: float, began: tuple[int, int]
    ) -> Metrics:
        """The metrics of a step.

        Args:
            counts: of the step, over all ranks.
            state: after the step.
            seconds: that the step took, on the clock.
            waited: of these, for this rank's batches.
            lr: base learning rate.
            grad_norm: before clipping.
            began: cursor where the step's data begins: `xc-data replay` starts there.
        """
        totals = state.totals
        return {
            "progress": state.progress,
            "optim/lr": lr,
            **{f"optim/lr_by_rule/{rule}": lr * scale for rule, scale in self._lr_scales.items()},
            "optim/grad_norm": grad_norm,
            "throughput/tokens_per_s": counts.tokens / seconds,
            "throughput/supervised_tokens_per_s": counts.supervised / seconds,
            "throughput/image_tokens_per_s": counts.image_tokens / seconds,
            "throughput/images_per_s": counts.images / seconds,
            "throughput/step_s": seconds,
            "throughput/data_wait_share": waited / seconds,
            "data/window": began[0],
            "data/pack": began[1],
            "data/fill": counts.tokens / self._capacity,
            "data/tokens": totals["tokens"],
            "data/supervised_tokens": totals["supervised"],
            "data/image_tokens": totals["image_tokens"],
            "data/images": totals["images"],
            "data/samples": sum(totals.get(f"source/{name}/segments", 0) for name in self._rows),
            **{f"data/samples_by_source/{name}": totals.get(f"source/{name}/segments", 0) for name in self._rows},
            **{f"data/epochs_by_source/{name}": state.drawn.before.get(name, 0) / rows for name, rows in self._rows.items() if rows},
            "health/skipped_steps": totals["skipped"],
            "health/bad_samples": totals["dropped"],
            "health/goodput": totals["step_ms"] / 1000 / (time.monotonic() - self._lives_began),
        }
