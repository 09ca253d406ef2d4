"""Held-out figures arranged for reading: table rows, and a gallery where each picture meets the captions of all stages.

Invariant: pure; nothing is chosen here: a gallery shows the samples that the evaluation stored, in its order.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from train.report.collect import HALVES, Stage

CHANCE = 0.1
"""Of picking one caption of ten, where an evaluation does not say how many there were."""
SPLIT_NOTES = {
    "unseen_picture": ("Unseen pictures", "The concept was trained on, drawn in another art style; this picture of it never was."),
    "unseen_concept": ("Unseen concepts", "Neither picture nor caption was trained on, in any style."),
    "held_out": ("Held-out pictures", ""),
}


@dataclass(frozen=True)
class Row:
    """One stage on one half of one split."""

    stage: str
    half: str
    figures: dict[str, Any]
    """Mean and standard error by name; None where not measured."""


@dataclass(frozen=True)
class Caption:
    """What one stage said about a picture."""

    stage: str
    generated: list[tuple[str, bool]]
    """Pieces of the greedy caption, and whether the piece is a word of the reference."""
    generated_right: bool
    retrieved: str
    retrieved_right: bool


@dataclass(frozen=True)
class Card:
    """One picture of the gallery."""

    key: str
    image: str
    reference: str
    captions: list[Caption]


def split_title(split: str) -> tuple[str, str]:
    """A split's heading and what it holds."""
    return SPLIT_NOTES.get(split, (split, ""))


def undivided(stages: list[Stage]) -> set[str]:
    """Splits that have no halves: all of their captions count."""
    return {name for stage in stages for name in stage.splits() if name.rpartition("/")[2] not in HALVES}


def rows(stages: list[Stage], splits: list[str]) -> dict[str, list[Row]]:
    """Table rows by split: validation above test, in order of stages; `language_model` is the language stage without a picture."""
    base = next((s for s in stages if s.stage == "language"), None)
    table: dict[str, list[Row]] = {split: [] for split in splits}
    for split in splits:
        for stage in (s for s in stages if s.stage != "language"):
            for half in HALVES:
                own, blind = stage.split(split, half), base.split(split, half) if base else None
                if own is None or "nll_right" not in own:
                    continue
                figures = {name: _figure(own, name) for name in ("nll_right", "nll_wrong", "nll_blind", "retrieval_of_10", "greedy_exact")}
                figures |= {
                    "chance": own.get("retrieval_by_guessing", CHANCE),
                    "pictures": own.get("pictures"),
                    "nll_language_model": _figure(blind or {}, "nll_blind"),
                }
                table[split].append(Row(stage.stage, half, figures))
    return table


def verdict(figure: tuple[float, float | None] | None, pictures: int | None, chance: float = CHANCE) -> str:
    """Whether a retrieval rate can be told from guessing: two standard errors of guessing over as many pictures."""
    if figure is None or not pictures:
        return "not measured"
    margin = 2 * math.sqrt(chance * (1 - chance) / pictures)
    if figure[0] > chance + margin:
        return "above chance"
    return "below chance" if figure[0] < chance - margin else "cannot be told from chance"


def gallery(stages: list[Stage], split: str) -> list[Card]:
    """The stored samples of a split's test half, each once, with the captions of every stage that has it."""
    cards: dict[str, Card] = {}
    for stage in stages:
        for sample in (stage.split(split) or {}).get("samples") or []:
            image = str(sample.get("image", ""))
            reference, generated, retrieved = (str(sample.get(name, "")) for name in ("reference", "generated", "retrieved"))
            card = cards.setdefault(
                str(sample.get("key")), Card(str(sample.get("key")), image if image.startswith("data:image/") else "", reference, [])
            )
            card.captions.append(
                Caption(
                    stage.stage,
                    _pieces(generated, reference),
                    sample.get("generated_right", _same(generated, reference)),
                    retrieved,
                    sample.get("retrieved_right", _same(retrieved, reference)),
                )
            )
    return list(cards.values())


def _figure(figures: dict[str, Any], name: str) -> tuple[float, float | None] | None:
    mean = figures.get(name)
    return None if mean is None else (mean, (figures.get("stderr") or {}).get(name))


def _same(ours: str, theirs: str) -> bool:
    """Equal but for case and white space: a word-level tokenizer writes spaces around punctuation."""
    return "".join(ours.lower().split()) == "".join(theirs.lower().split())


def _pieces(caption: str, reference: str) -> list[tuple[str, bool]]:
    words = set(re.findall(r"\w+", reference.lower()))
    return [(piece, piece.lower() in words) for piece in re.split(r"(\w+)", caption) if piece]
