"""Where metrics go: `metrics.jsonl` always, TensorBoard and wandb as configured.

Invariant: training never stops because of a tracker, and `metrics.jsonl` names the life of every line, so that steps which a later life
replayed are told apart. Only rank 0 tracks.
"""

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipeline import jsonl
from train.config import Config
from train.run_dir import RunDir, write_atomic
from train.tracking.captions import Caption, keep

log = logging.getLogger(__name__)

Metrics = dict[str, float | int]


class Tracker(Protocol):
    """One dashboard."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Shows the metrics of a step."""

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Shows what was written about held-out pictures."""

    def close(self) -> None:
        """Flushes."""


class JsonLines:
    """`metrics.jsonl`: one line a step."""

    def __init__(self, run: RunDir, life: int) -> None:
        self._run, self._path, self._life = run, run.metrics, life

    def log(self, step: int, metrics: Metrics) -> None:
        """Appends the step; a number that JSON does not know becomes null."""
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        jsonl.append(self._path, [{"step": step, "life": self._life, "time": time.time(), **known}])

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Keeps them in `validation/`, for the report."""
        keep(self._run, step, self._life, captions)

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoard:
    """Event files in `tracking/tensorboard`."""

    def __init__(self, run: RunDir, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier life wrote past its checkpoint.
        self._writer = SummaryWriter(str(run.tracking / "tensorboard"), purge_step=step)
        self._shown: set[str] = set()

    def log(self, step: int, metrics: Metrics) -> None:
        """Adds a point to each curve, all in one event: forty calls of `add_scalar` would cost milliseconds."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """A table a split in the tab of texts; each picture once a life in that of images, under its key."""
        for split in dict.fromkeys(c.split for c in captions):
            rows = [(c.key, c.reference, c.generated) for c in captions if c.split == split]
            lines = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in (("key", "reference", "generated"), *rows)]
            self._writer.add_text(f"validation/captions/{split}", "\n".join([lines[0], "|---|---|---|", *lines[1:]]), step)
        for c in captions:
            if c.key not in self._shown:
                self._writer.add_image(f"validation/pictures/{c.split}/{c.key}", c.pixels, step)
                self._shown.add(c.key)

    def close(self) -> None:
        """Writes what is held back."""
        self._writer.close()


class Wandb:
    """Weights & Biases; a resumed run goes on under the id that the run directory keeps."""

    def __init__(self, run: RunDir, config: Config, settings: dict[str, Any]) -> None:
        import wandb

        folder = run.tracking
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:8].encode())
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        self._run = wandb.init(
            project=config.track.project,
            name=config.run.name,
            id=id_file.read_text(),
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=settings,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        """Sends the step."""
        self._run.log({"step": step, **metrics})

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Sends a table of the words, and the pictures above theirs: pictures within a table would leave the run directory."""
        import wandb

        rows = [[c.split, c.key, c.reference, c.generated] for c in captions]
        table = wandb.Table(columns=["split", "key", "reference", "generated"], data=rows)
        pictures = [wandb.Image(c.pixels.transpose(1, 2, 0), caption=f"{c.reference}: {c.generated}") for c in captions]
        self._run.log({"step": step, "validation/captions": table, "validation/pictures": pictures})

    def close(self) -> None:
        """Ends this life's part of the run."""
        self._run.finish()


class Trackers:
    """All of them, each shielded from the others and the run from each."""

    def __init__(self, run: RunDir, config: Config, settings: dict[str, Any], life: int, step: int) -> None:
        self._lines = JsonLines(run, life)
        self._others: list[Tracker] = []
        for wanted, make in (
            (config.track.tensorboard, lambda: TensorBoard(run, step)),
            (config.track.wandb, lambda: Wandb(run, config, settings)),
        ):
            if wanted:
                try:
                    self._others.append(make())
                except Exception as error:  # noqa: BLE001  trackers raise their own, and none may stop a run
                    log.warning("tracker off: %s", error)

    def log(self, step: int, metrics: Metrics) -> None:
        """Writes one step everywhere."""
        self._lines.log(step, metrics)
        self._tell(step, lambda tracker: tracker.log(step, metrics))

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Shows captions everywhere."""
        self._lines.show(step, captions)
        self._tell(step, lambda tracker: tracker.show(step, captions))

    def _tell(self, step: int, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._others):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001  as above
                log.warning("tracker off after step %d: %s", step, error)
                self._others.remove(tracker)

    def close(self) -> None:
        """Flushes everything."""
        for tracker in self._others:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001  as above
                log.warning("tracker did not close: %s", error)


def _cell(text: str) -> str:
    """Text that stays within a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False
