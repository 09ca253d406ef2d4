"""Where metrics go: `metrics.jsonl` always, TensorBoard and wandb as configured.

Invariant: training never stops because of a tracker, and `metrics.jsonl` names the life of every line, so that steps which a later life
replayed are told apart. Only rank 0 tracks.
"""

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

Metrics = dict[str, float | int]

PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "120"}
"""Seconds that wandb may try to reach its server when a life begins, and go on sending when it ends (else 90, and for ever).

What is not sent lies in the run directory, for `wandb sync`. A user's own environment comes first.
"""


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

        # Hides what an earlier life wrote past its checkpoint, from purge_step on: the step of the checkpoint is not done again.
        self._writer = SummaryWriter(str(run.tracking / "tensorboard"), purge_step=step + 1)
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
    """Weights & Biases; a resumed run goes on under the id that the run directory keeps.

    Its own step is ours, which never goes back: steps up to `told`, which an earlier life showed before it was killed, are not sent again.
    """

    def __init__(self, run: RunDir, config: Config, settings: dict[str, Any], told: int, say: Callable[[str], None]) -> None:
        import wandb

        folder = run.tracking
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:8].encode())

        def begin(mode: str) -> Any:
            return wandb.init(
                project=config.track.project,
                name=config.run.name,
                id=id_file.read_text(),
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),
            )

        for name, seconds in PATIENCE.items():
            os.environ.setdefault(name, seconds)
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
        try:
            self._run = begin(mode)
        except wandb.errors.CommError as error:
            say(f"wandb cannot be reached: {_line(error)} (this life is kept in {folder}, for wandb sync)")
            wandb.teardown()  # its server process holds the id of the run that did not come about
            self._run = begin("offline")
        self._told = told
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        """Sends the step."""
        if step > self._told:
            self._run.log({"step": step, **metrics}, step=step)

    def show(self, step: int, captions: Sequence[Caption]) -> None:
        """Sends a table of the words, and the pictures above theirs: pictures within a table would leave the run directory."""
        import wandb

        if step <= self._told:
            return
        rows = [[c.split, c.key, c.reference, c.generated] for c in captions]
        table = wandb.Table(columns=["split", "key", "reference", "generated"], data=rows)
        pictures = [wandb.Image(c.pixels.transpose(1, 2, 0), caption=f"{c.reference}: {c.generated}") for c in captions]
        self._run.log({"step": step, "validation/captions": table, "validation/pictures": pictures}, step=step)

    def close(self) -> None:
        """Ends this life's part of the run."""
        self._run.finish()


class Trackers:
    """All of them, each shielded from the others and the run from each."""

    def __init__(self, run: RunDir, config: Config, settings: dict[str, Any], life: int, step: int, say: Callable[[str], None]) -> None:
        """`step` is that of the checkpoint that the life goes on from; `say` tells the user of a tracker that is off from now on."""
        self._lines, self._say = JsonLines(run, life), say
        self._others: list[Tracker] = []
        for wanted, make in (
            (config.track.tensorboard, lambda: TensorBoard(run, step)),
            (config.track.wandb, lambda: Wandb(run, config, settings, _newest_step(run), say)),
        ):
            if wanted:
                try:
                    self._others.append(make())
                except Exception as error:  # noqa: BLE001  trackers raise their own, and none may stop a run
                    self._off(step, error)

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
                self._off(step, error)
                self._others.remove(tracker)

    def _off(self, step: int, error: Exception) -> None:
        self._say(f"a tracker is off after step {step}: {_line(error)} (training goes on, metrics.jsonl has every step)")

    def close(self) -> None:
        """Flushes everything."""
        for tracker in self._others:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001  as above
                self._say(f"a tracker did not close: {_line(error)} (metrics.jsonl has every step)")


def _newest_step(run: RunDir) -> int:
    """The furthest step that a life has shown."""
    return max((line["step"] for line in jsonl.read(run.metrics)), default=0)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _cell(text: str) -> str:
    """Text that stays within a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False
