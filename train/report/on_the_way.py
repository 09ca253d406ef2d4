"""What was measured on held-out data while a stage trained: panels of losses, and the captions of the same pictures step after step.

Invariant: pure; of a step that was done again, what the newest life wrote counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.inspect import charts
from train.report.collect import Stage, Step

MOST_STEPS = 8
"""Captions a picture that the page shows: spread evenly, the last one always."""
COLORS = {"nll_right": "--right", "nll_wrong": "--wrong", "nll_blind": "--blind"}
NAMES = {"nll_right": "right picture", "nll_wrong": "wrong picture", "nll_blind": "no picture"}


@dataclass(frozen=True)
class Written:
    """One picture and what was written about it."""

    split: str
    key: str
    image: str
    reference: str
    captions: list[tuple[int, str]]
    """By step."""


@dataclass(frozen=True)
class OnTheWay:
    """The part of a stage's page."""

    panels: list[tuple[str, charts.Chart]]
    seeing: bool
    """Whether a panel compares pictures: the colours need a legend."""
    written: list[Written]


def on_the_way(stage: Stage) -> OnTheWay:
    """Everything under `validation/` in the metrics, and the kept captions."""
    measured = [s for s in stage.steps if any(name.startswith("validation/") for name in s.values)]
    names = dict.fromkeys(name for s in measured for name in s.values if name.startswith("validation/"))
    splits = dict.fromkeys(name.removeprefix("validation/").rpartition("/")[0] for name in names)
    panels = [(f"Nats a token, {split}", _panel(measured, [f"validation/{split}/{figure}" for figure in COLORS])) for split in splits]
    panels.append(("Nats a token, text alone", _panel(measured, ["validation/text/nll"])))
    panels.append(("Text: nats above the start of the stage", _panel(measured, ["validation/text/minus_base"])))
    drawn = [(name, panel) for name, panel in panels if panel]
    return OnTheWay(drawn, any("nll_right" in name for name in names), _written(stage))


def _panel(steps: Sequence[Step], metrics: Sequence[str]) -> charts.Chart | None:
    lines = []
    for metric in metrics:
        found, figure = [s for s in steps if metric in s.values], metric.rpartition("/")[2]
        color, name = f"var({COLORS.get(figure, '--accent')})", NAMES.get(figure, "text")
        lines.append(charts.Series(name, color, [s.number for s in found], [s.values[metric] for s in found], [1.0] * len(found)))
    return charts.draw(lines, smooth=False, x_count=3, y_count=3)


def _written(stage: Stage) -> list[Written]:
    found: dict[tuple[str, str], Written] = {}
    steps = sorted(stage.captions)
    every = -(-len(steps) // MOST_STEPS) if steps else 1
    for step in [s for i, s in enumerate(steps) if (len(steps) - 1 - i) % every == 0]:
        for line in stage.captions[step]:
            split, key, reference, generated = (str(line.get(name, "")) for name in ("split", "key", "reference", "generated"))
            image = str(stage.pictures.get(key, ""))
            card = found.setdefault((split, key), Written(split, key, image if image.startswith("data:image/") else "", reference, []))
            card.captions.append((step, generated))
    return list(found.values())
