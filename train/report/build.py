"""Writes `summary.json` and `report.html` of the stages of one model.

Invariant: the page loads nothing, treats all that it shows as text, and says of what is missing that it was not measured. Both files
appear whole.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from data_pipeline.errors import UserError
from data_pipeline.inspect import charts
from train.report.collect import Fate, Stage, Step, collect
from train.report.held_out import CHANCE, gallery, rows, split_title, undivided, verdict
from train.report.on_the_way import on_the_way
from train.report.summary import ledger_counts, reason_of, split_names, summarise
from train.run_dir import write_atomic

STAGE_NOTES = {
    "language": "The decoder learns words from text alone. It stands in for a pretrained language model.",
    "pretrain": "The language model is frozen. Vision tower, projector and Partial LoRA learn to speak to it.",
    "sft": "Everything learns, the language model included.",
    "compose": "Free-form composition of text and pictures.",
}
SMALL = 100_000_000
"""Below this many parameters the page says that the model is a demonstration."""
EXAMPLES = 3


@dataclass(frozen=True)
class Training:
    """The panels and numbers of one stage's training."""

    loss: charts.Chart | None
    small: list[tuple[str, charts.Chart]]
    marks: list[tuple[float, str, str]]
    """(percent of the steps, kind, words): resumes and skipped steps on the loss curve."""
    facts: list[tuple[str, str]]
    lives: list[dict[str, Any]]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes both files into the folder, the page elsewhere if there is an `output`; returns the page's path.

    Raises:
        UserError: there is no run directory, or a file cannot be written.
    """
    stages = collect(folder)
    summary = summarise(stages)
    page = render(folder.resolve().name, stages, summary)
    target = output or folder / "report.html"
    try:
        write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
        write_atomic(target, page.encode("utf-8", "replace"))
    except OSError as error:
        where = f"into {folder.resolve()}" if output is None else f"{output.absolute()}, or summary.json into {folder.resolve()}"
        raise UserError(f"cannot write {where}: {error.strerror} (free space, make it writable, or choose another -o)") from None
    return target


def render(title: str, stages: list[Stage], summary: dict[str, Any]) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(Path(__file__).parent), jinja2.PackageLoader("data_pipeline.inspect", ".")]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "pct": lambda v, digits=1: "–" if v is None else f"{100 * v:.{digits}f} %",
        "num": lambda v, digits=3: "–" if v is None else f"{v:.{digits}f}",
        "duration": duration,
        "moment": moment,
    }
    splits = split_names(stages)
    table = rows(stages, splits)
    names = [s.stage for s in stages]
    parameters = max((int((s.manifest or {}).get("parameters", 0)) for s in stages), default=0)
    return environment.get_template("report.html").render(
        title=title,
        stages=stages,
        training=[_training(stage) for stage in stages],
        on_the_way=[on_the_way(stage) for stage in stages],
        notes=STAGE_NOTES,
        fates=Fate,
        summary=summary,
        splits=[(split, *split_title(split)) for split in splits],
        undivided=undivided(stages),
        rows=table,
        chance=next((row.figures["chance"] for row in table[splits[0]]), CHANCE),
        gallery=[(split, *split_title(split), gallery(stages, split)) for split in splits],
        verdict=verdict,
        twice=sorted({name for name in names if names.count(name) > 1}),
        machine=_machine(stages),
        small=0 < parameters < SMALL,
        parameters=f"{parameters / 1e6:,.1f} M parameters" if parameters else "",
        ledger=_ledger(stages),
        counts=ledger_counts(stages),
        written=datetime.now(timezone.utc).timestamp(),
    )


def duration(seconds: float | None) -> str:
    """Wall time in words."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(seconds: float) -> str:
    """A time of day that means the same everywhere."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _training(stage: Stage) -> Training:
    sources = [m.partition("/")[2] for m in dict.fromkeys(k for s in stage.steps for k in s.values) if m.startswith("loss_by_source/")]
    by_source = [
        series(stage.steps, f"loss_by_source/{name}", name, f"var(--s{i % 6})", [f"tokens_by_source/{name}"])
        for i, name in enumerate(sources)
    ]
    total = series(stage.steps, "loss/train", "all sources", "var(--ink)", [f"tokens_by_source/{name}" for name in sources])
    loss = charts.draw([*by_source, total] if len(sources) != 1 else by_source, smooth=True)
    panels = []
    for name, metric, smooth, zero in (
        ("Learning rate", "optim/lr", False, True),
        ("Tokens a second", "throughput/tokens_per_s", True, True),
        ("Gradient norm", "optim/grad_norm", True, True),
    ):
        panel = charts.draw([series(stage.steps, metric, name, "var(--accent)")], smooth=smooth, zero=zero, x_count=3, y_count=3)
        if panel:
            panels.append((name, panel))
    last = max((s.number for s in stage.steps), default=0)
    return Training(loss, panels, _marks(stage, last), _facts(stage), _lives(stage, last))


def series(steps: Sequence[Step], metric: str, name: str, color: str, weights: Sequence[str] = ()) -> charts.Series:
    """One metric of the steps that have it; a step weighs as much as the sum of the metrics in `weights`."""
    found = [s for s in steps if metric in s.values]
    weights_of = [sum(s.values.get(w, 0.0) for w in weights) if weights else 1.0 for s in found]
    return charts.Series(name, color, [s.number for s in found], [s.values[metric] for s in found], weights_of)


def _marks(stage: Stage, last: int) -> list[tuple[float, str, str]]:
    marks = []
    for before, life in zip(stage.lives, stage.lives[1:], strict=False):
        step = life.resumed_from or 0
        if last:
            how = f"{before.fate.value} after step {before.last_step}"
            back = "" if life.went_back_to is None else f" with the weights of step {life.went_back_to}"
            words = f"life {before.number} {how}; life {life.number} went on from step {step}{back}"
            marks.append((100 * min(1, step / last), "resume", words))
    skipped = 0.0
    for step in stage.steps:
        now = step.values.get("health/skipped_steps", 0.0)
        if now > skipped:
            marks.append((100 * step.number / last, "skip", f"step {step.number} was skipped: no update"))
        skipped = now
    return marks


def _facts(stage: Stage) -> list[tuple[str, str]]:
    """What a reader wants to know before looking at curves; counters are of the steps that count."""
    if not stage.steps:
        return []
    last = stage.steps[-1]
    speeds = sorted(s.values["throughput/tokens_per_s"] for s in stage.steps if "throughput/tokens_per_s" in s.values)
    waits = [s.values["throughput/data_wait_share"] for s in stage.steps if "throughput/data_wait_share" in s.values]
    facts = [("steps", f"{last.number:,}")]
    facts += [
        (name, f"{last.values[key]:,.0f}") for name, key in (("tokens", "data/tokens"), ("images", "data/images")) if key in last.values
    ]
    facts += [("training time", duration(stage.train_seconds))]
    facts += [("median tokens/s", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    facts += [("waiting for data", f"{100 * sum(waits) / len(waits):.1f} %")] if waits else []
    facts += [(name, f"{last.values[key]:,.0f}") for name, key in _HEALTH if key in last.values]
    if stage.train_seconds:
        facts.append(("time in kept steps", f"{100 * min(1.0, stage.kept_seconds / stage.train_seconds):.0f} %"))
    return facts


_HEALTH = (("skipped steps", "health/skipped_steps"), ("bad samples", "health/bad_samples"))


def _lives(stage: Stage, last: int) -> list[dict[str, Any]]:
    """Each life with its place on the axis of steps, and with how long nothing ran before it."""
    end = max([last, *(life.last_step for life in stage.lives)], default=0) or 1
    views = []
    for i, life in enumerate(stage.lives):
        first = life.resumed_from or 0
        following = stage.lives[i + 1] if i + 1 < len(stage.lives) else None
        back = (following.resumed_from or 0) if following else life.last_step
        views.append(
            {
                "life": life,
                "left": 100 * first / end,
                "width": 100 * max(0, life.last_step - first) / end,
                "undone": max(0, life.last_step - back),
                "undone_width": 100 * max(0, life.last_step - max(back, first)) / end,
                "pause": max(0.0, life.start - stage.lives[i - 1].end) if i else None,
            }
        )
    return views


def _ledger(stages: list[Stage]) -> list[dict[str, Any]]:
    """Bad samples by where they were found and why, with the first few as examples."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for stage in stages:
        for entry in stage.ledger:
            where = f"{stage.name}, while training" if "step" in entry else "index"
            keys = groups.setdefault((where, entry["source"], reason_of(entry)), [])
            place = f"{entry.get('key') or 'no key'} in {entry['shard']} at byte {entry['offset']:,}"
            if "step" in entry or place not in keys:  # several stages may read one source
                keys.append(place)
    return [
        {"where": where, "source": source, "reason": reason, "count": len(keys), "examples": keys[:EXAMPLES]}
        for (where, source, reason), keys in groups.items()
    ]


def _machine(stages: list[Stage]) -> str:
    """What the runs ran on, as far as they noted it."""
    worlds = sorted({life.world for s in stages for life in s.lives if life.world})
    types = sorted({str((s.evaluation or {}).get("dtype", "")).removeprefix("torch.") for s in stages} - {""})
    zero = sorted({str((s.config.get("deepspeed") or {}).get("stage")) for s in stages} - {"None"})
    devices = sorted({life.device for s in stages for life in s.lives} - {""})
    parts = [f"trained on {' and '.join(devices)}" if devices else ""]
    parts += [f"{' or '.join(map(str, worlds))} rank{'s' if worlds != [1] else ''}" if worlds else ""]
    parts += [f"DeepSpeed ZeRO-{', '.join(zero)}" if zero else "", f"weights in {', '.join(types)}" if types else ""]
    return ", ".join(p for p in parts if p)
