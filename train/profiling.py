"""A torch profiler trace of some steps, and on GPUs a snapshot of memory.

Invariant: outside the configured steps nothing is recorded and nothing costs; rank 0 alone records.

    RUN/profile/steps-A-B.json.gz      for https://ui.perfetto.dev or chrome://tracing
    RUN/profile/steps-A-B.memory.pickle   for https://pytorch.org/memory_viz (GPUs)
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from train.config import ProfileConfig


class Profiling:
    """Records from the start of the first step to the end of the last."""

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int) -> None:
        self._first, self._last = config.steps if config.steps and rank == 0 else (0, 0)
        self._folder = run_dir / "profile"
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """The step with this number, from 1, begins."""
        if self._profile is None and self._first <= step <= self._last:
            on_gpu = torch.cuda.is_available()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._first = step  # a resumed life may begin in the middle
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            if on_gpu:
                torch.cuda.memory._record_memory_history()

    def after(self, step: int) -> None:
        """It ended."""
        if self._profile is not None and step == self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """Writes what was recorded up to this step, if anything was."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"steps-{self._first}-{step}"
        self._profile.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
