"""How foreign tensors become the model's parameters and back, and the table of what does not fit.

Invariant: a map is data: every parameter of the model that a format covers has one entry, and whether a folder fits is decided from
headers alone, before anything is read.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from train.weights.hub import HubFolder

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROWS = 40
"""Lines of a table; a wrong `model` section makes hundreds."""

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
"""Shapes of the model's parameters by name."""


def _only(parts: Sequence[Tensor]) -> Tensor:
    (part,) = parts
    return part


def _alone(parameter: Tensor) -> list[Tensor]:
    return [parameter]


@dataclass(frozen=True)
class Entry:
    """One parameter of the model and the foreign tensors that it is made of."""

    ours: str
    theirs: dict[str, Shape]
    """Shapes by name, in the order that `join` takes."""
    join: Callable[[Sequence[Tensor]], Tensor] = field(default=_only)
    split: Callable[[Tensor], list[Tensor]] = field(default=_alone)
    """Inverse of `join`, bitwise."""
    table: bool = False
    """A position table: any square number of rows after the first fits."""


class Row(NamedTuple):
    """A line of the table of what does not fit."""

    problem: str
    name: str
    where: str
    what: str


def fits(entries: Sequence[Entry], folder: HubFolder, key: str, ignored: str = r"$^", differing: Sequence[Row] = ()) -> None:
    """Checks names, shapes and number formats against the folder's headers.

    Args:
        entries: what is wanted.
        folder: what is there.
        key: of the config, which named the folder.
        ignored: pattern of tensors that such a folder may hold beside the wanted ones.
        differing: what is known not to fit already.

    Raises:
        UserError: a line that says how many things do not fit, and a table of them.
    """
    wanted = {name: (shape, entry.table) for entry in entries for name, shape in entry.theirs.items()}
    rows = list(differing)
    rows += [Row("missing", name, "in no file", str(list(shape))) for name, (shape, _) in wanted.items() if name not in folder.facts]
    for name, fact in folder.facts.items():
        if name not in wanted:
            if not re.search(ignored, name):
                rows.append(Row("unexpected", name, fact.file, str(list(fact.shape))))
            continue
        shape, table = wanted[name]
        if fact.shape != shape and not (table and _is_table(fact.shape, shape)):
            rows.append(Row("wrong shape", name, fact.file, f"{list(fact.shape)}, not {list(shape)}"))
        if fact.dtype not in FLOATS:
            rows.append(Row("wrong type", name, fact.file, f"{str(fact.dtype).removeprefix('torch.')}, not a floating-point format"))
    if rows:
        raise UserError(
            f"{key}: {folder.folder} does not fit the model in {len(rows)} places (use the `model` section that belongs to it, or "
            f"other weights)\n{_table(rows)}"
        )


@torch.no_grad()
def load(entries: Sequence[Entry], folder: HubFolder, parameters: dict[str, nn.Parameter]) -> None:
    """Fills the parameters, one after another in the order of the files, each converted to its own number format."""
    for entry in sorted(entries, key=lambda e: folder.facts[next(iter(e.theirs))].file):
        parameter = parameters[entry.ours]
        tensor = entry.join([folder.read(name) for name in entry.theirs])
        parameter.copy_(resample(tensor, parameter.shape[1]) if entry.table else tensor)


def resample(table_1PD: Tensor, rows: int) -> Tensor:
    """A position table for another image size: [1, 1 + g * g, D] to [1, rows, D].

    As the official code does it: bicubic without antialias, patch rows rounded to fp16, the first (class) row kept.
    """
    old, new = isqrt(table_1PD.shape[1] - 1), isqrt(rows - 1)
    if old == new:
        return table_1PD
    first, grid = table_1PD[:, :1], table_1PD[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2).half().to(first.dtype)], dim=1)


def _is_table(found: Shape, wanted: Shape) -> bool:
    if len(found) != len(wanted) or found[-1] != wanted[-1]:
        return False
    return all(rows > 1 and isqrt(rows - 1) ** 2 == rows - 1 for rows in (found[-2], wanted[-2]))


def _table(rows: Sequence[Row]) -> str:
    shown = [Row("problem", "name", "where", "what"), *rows[:ROWS]]
    widths = [max(len(row[i]) for row in shown) for i in range(3)]
    lines = ["  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in shown]
    return "\n".join([*lines, *([f"  ... and {len(rows) - ROWS} more"] if len(rows) > ROWS else [])])
