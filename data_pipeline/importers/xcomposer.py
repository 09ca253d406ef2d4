"""The official fine-tuning data of InternLM-XComposer: JSON lists of conversations, and `data.txt`, which mixes several.

Invariant: every file of the mixture becomes a source of its own, so that the mix stays a line in a config and not a copy of samples.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from omegaconf import OmegaConf

from data_pipeline.errors import UserError
from data_pipeline.importers.jsonl import samples

__all__ = ["Part", "mixture", "samples", "sources_yaml"]

SUFFIXES = (".json",)


@dataclass(frozen=True)
class Part:
    """One file of a mixture."""

    name: str
    """Of its source."""
    file: Path
    weight: str | None
    """What the mixture says, in thousands of samples an epoch; None where it has no weights."""


def mixture(path: Path) -> list[Part]:
    """The lines `FILE WEIGHT` of a `data.txt`; paths are relative to it, as where the official script is started beside it.

    Raises:
        UserError: a line names no file, or some lines have weights and others none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path.resolve()}: {error} (give a data.txt with lines FILE WEIGHT)") from None
    parts: list[Part] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        words = line.strip().rsplit(maxsplit=1)
        name, weight = words if len(words) == 2 and _is_number(words[1]) else (line.strip(), None)
        file = path.parent / name
        if not file.is_file():
            raise UserError(f"{path} line {number}: no such file {file.resolve()} (lines are FILE WEIGHT, relative to {path.name})")
        parts.append(Part(_unique(file.stem, {part.name for part in parts}), file, weight))
    if not parts:
        raise UserError(f"{path} names no file (lines are FILE WEIGHT)")
    if len({part.weight is None for part in parts}) > 1:
        raise UserError(f"{path}: some files have a weight and others none (give every line one)")
    return parts


def sources_yaml(parts: list[Part], folder: Path) -> str:
    """The `data` section that mixes the parts as the official script does: so many thousand samples of each."""
    weighted = parts[0].weight is not None
    sources = {part.name: {"path": str(folder / part.name), "weight": part.weight if weighted else "1"} for part in parts}
    section = {"data": {"unit": "samples" if weighted else "epochs", "sources": sources}}
    return OmegaConf.to_yaml(OmegaConf.create(section))


def _is_number(text: str) -> bool:
    try:
        return Fraction(text) >= 0
    except (ValueError, ZeroDivisionError):
        return False


def _unique(stem: str, taken: set[str]) -> str:
    """A name that is safe as a folder, as a key of YAML and of a config."""
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_") or "source"
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
