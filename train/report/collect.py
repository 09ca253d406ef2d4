"""Reads what runs left behind into plain values: config, steps, lives, ledger, held-out figures.

Invariant: a step counts once, as the newest life left it: a line is undone when a later life went back to before it. What is missing or
half-written is left out and noted, never an error.
"""

import json
import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_TRY_AGAIN, UserError
from data_pipeline.read.ledger import read_ledger
from train.run_dir import RunDir

ALIVE_S = 300.0
"""A life that has not said how it ended counts as running while its heartbeat is younger than this."""


class Fate(Enum):
    """How a life ended."""

    running = "running"  # it beat a moment ago
    done = "done"
    stopped = "stopped"  # on request, with a checkpoint (code 75)
    killed = "killed"  # it never said, or a rank was lost (code 1)
    failed = "failed"  # it says why (codes 2 and 70)


HALVES = ("validation", "test")
"""Of a held-out split: the first is for choosing settings, the second for what is reported."""


@dataclass(frozen=True)
class Life:
    """One process group's time on a run."""

    number: int
    world: int | None
    device: str
    """What it ran on; empty where it was not noted."""
    start: float
    """Seconds since the epoch."""
    end: float
    """As noted; else the last moment that something is known of it."""
    end_noted: bool
    resumed_from: int | None
    """Step of the checkpoint that it went on from; nothing where it began at the beginning."""
    went_back_to: int | None
    """Step whose weights it had, where the guard gave up the steps after that (train/rollback.py)."""
    last_step: int
    """Last step that it reported."""
    fate: Fate
    reason: str

    @property
    def seconds(self) -> float:
        """Wall time; never negative, also where the clock was set back."""
        return max(0.0, self.end - self.start)


@dataclass(frozen=True)
class Step:
    """Metrics of one step; only finite values."""

    number: int
    life: int
    values: dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One run directory."""

    path: Path
    stage: str
    """run.stage: language, pretrain, sft or compose."""
    name: str
    config: dict[str, Any]
    config_text: str
    steps: list[Step]
    undone_steps: int
    """Reported steps that a later life did again."""
    lives: list[Life]
    ledger: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    manifest: dict[str, Any] | None
    """Of the final weights; nothing where the run is not finished."""
    captions: dict[int, list[dict[str, Any]]]
    """By step, what was written about held-out pictures while the run trained."""
    pictures: dict[str, Any]
    """These pictures by key, as data URIs."""
    notes: list[str]
    """What could not be read."""

    @property
    def train_seconds(self) -> float | None:
        """Wall time of all lives; time between them is not counted."""
        return sum(life.seconds for life in self.lives) if self.lives else None

    @property
    def kept_seconds(self) -> float:
        """Wall time of the steps whose weights were kept."""
        undone = {n for life in self.lives if life.went_back_to is not None for n in range(life.went_back_to, life.resumed_from or 0)}
        return sum(step.values.get("throughput/step_s", 0.0) for step in self.steps if step.number - 1 not in undone)

    @property
    def resumes(self) -> int:
        """Lives that went on from a checkpoint."""
        return sum(life.resumed_from is not None for life in self.lives)

    def split(self, name: str, half: str = "test") -> dict[str, Any] | None:
        """Held-out figures of a half of one split, such as the test half of `unseen_picture`."""
        return next((found for key, found in self.splits().items() if split_and_half(key) == (name, half)), None)

    def splits(self) -> dict[str, dict[str, Any]]:
        """All held-out figures, by the name that `evaluate.splits` gives."""
        return (self.evaluation or {}).get("splits") or {}

    def text(self) -> dict[str, Any] | None:
        """Figures on held-out text."""
        return (self.evaluation or {}).get("text")


def split_and_half(name: str) -> tuple[str, str]:
    """What a name of `evaluate.splits` says: `birds/validation` is a half of `birds`, `test` one of what has no other name; a split that
    is not halved counts as a test half.
    """
    split, _, half = name.rpartition("/")
    return (split or "held_out", half) if half in HALVES else (name, "test")


def collect(folder: Path, now: float | None = None) -> list[Stage]:
    """The stages of a folder of run directories, or of one run directory, in order of their start.

    Raises:
        UserError: there is no run directory.
    """
    runs = [folder] if RunDir(folder).config.exists() else sorted(file.parent for file in folder.glob("*/config.yaml"))
    if not runs:
        raise UserError(f"{folder.resolve()} holds no run directory: no config.yaml in it or one level below (give run.dir, or its parent)")
    stages = [read_stage(RunDir(path), time.time() if now is None else now) for path in runs]
    return sorted(stages, key=lambda s: s.lives[0].start if s.lives else math.inf)


def read_stage(run: RunDir, now: float) -> Stage:
    """All that one run directory holds."""
    notes: list[str] = []
    config, config_text = _config(run.config, notes)
    lines = [line for line in _json_lines(run.metrics, notes) if "step" in line]
    lives = _lives(run, lines, now, notes)
    steps = _steps(lines, lives)
    manifest = _json(run.final / "manifest.json", notes)
    evaluation = _json(run.evaluation, notes)
    if manifest and evaluation and evaluation.get("weights") != manifest.get("digest"):
        notes.append("evaluation.json was measured on other weights than those in final/ (delete it and run xc-train evaluate)")
    try:
        ledger = read_ledger(run.path)
    except (OSError, ValueError, KeyError) as error:
        ledger = []
        notes.append(f"the ledger cannot be read: {error}")
    return Stage(
        path=run.path,
        stage=str((config.get("run") or {}).get("stage") or run.path.name),
        name=str((config.get("run") or {}).get("name") or run.path.name),
        config=config,
        config_text=config_text,
        steps=steps,
        undone_steps=len(lines) - len(steps),
        lives=lives,
        ledger=ledger,
        evaluation=evaluation,
        manifest=manifest,
        captions=_captions(run.validation / "captions.jsonl", lives, notes),
        pictures=_json(run.validation / "pictures.json", notes) or {},
        notes=notes,
    )


def _steps(lines: list[dict[str, Any]], lives: list[Life]) -> list[Step]:
    """The lines that count, by step."""
    kept: dict[int, Step] = {}
    for line in lines:
        number, life = int(line["step"]), int(line.get("life", 1))
        if not _undone(number, life, lives) and (number not in kept or kept[number].life <= life):
            values = {k: float(v) for k, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
            kept[number] = Step(number, life, values)
    return [kept[number] for number in sorted(kept)]


def _undone(step: int, life: int, lives: list[Life]) -> bool:
    """Whether a later life went back to before what this life did in a step."""
    return any(later.number > life and (later.resumed_from or 0) < step for later in lives)


def _captions(file: Path, lives: list[Life], notes: list[str]) -> dict[int, list[dict[str, Any]]]:
    lines = [line for line in _json_lines(file, notes) if "step" in line and isinstance(line.get("captions"), list)]
    return {int(line["step"]): line["captions"] for line in lines if not _undone(int(line["step"]), int(line.get("life", 1)), lives)}


def _lives(run: RunDir, lines: list[dict[str, Any]], now: float, notes: list[str]) -> list[Life]:
    events = [e for e in _json_lines(run.lives, notes) if "life" in e and "time" in e]
    starts = {int(e["life"]): e for e in events if e.get("event") == "start"}
    ends = {int(e["life"]): e for e in events if e.get("event") == "end"}
    outcome = _json(run.outcome, notes) or {}
    heartbeat = _json(run.heartbeat, notes) or {}
    lives = []
    for number, start in sorted(starts.items()):
        began, own = float(start["time"]), [line for line in lines if line.get("life", 1) == number]
        newest = number == max(starts)
        end = ends.get(number) or (outcome if outcome.get("life") == number else None)
        if end:
            ended, code, reason = float(end["time"]), int(end.get("code", EXIT_CRASH)), str(end.get("reason", ""))
            fate = {EXIT_DONE: Fate.done, EXIT_TRY_AGAIN: Fate.stopped, EXIT_CRASH: Fate.killed}.get(code, Fate.failed)
        else:
            beat = float(heartbeat.get("time", 0.0)) if newest else 0.0
            following = min((float(s["time"]) for n, s in starts.items() if n > number), default=math.inf)
            ended = min(following, max(beat, began + sum(float(line.get("throughput/step_s", 0.0)) for line in own)))
            alive = newest and now - beat < ALIVE_S
            fate, reason = (Fate.running, "") if alive else (Fate.killed, "it did not say how it ended")
        resumed_from = start.get("resumed_from")
        reported = [int(line["step"]) for line in own] + [resumed_from or 0]
        if end and fate is not Fate.killed:  # of a killed life, the end is noted by the launcher, which does not know its step
            reported.append(int(end.get("step", 0)))
        lives.append(
            Life(
                number,
                start.get("world"),
                str(start.get("device") or ""),
                began,
                ended,
                bool(end),
                resumed_from,
                start.get("went_back_to"),
                max(reported),
                fate,
                reason,
            )
        )
    return lives


def _config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """Read without the schema, so that a page can be made of runs of another version."""
    try:
        text = path.read_text()
        config = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        notes.append(f"config.yaml cannot be read: {error}")
        return {}, ""
    return (config if isinstance(config, dict) else {}), text  # type: ignore[return-value]


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The whole lines of a file. A cut last line is usual after a kill; a damaged one before it is noted."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return []
    values, damaged = [], 0
    for line in text.split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        else:
            damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return values
