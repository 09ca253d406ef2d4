"""Error budgets: how much of each source a run may drop before it stops.

Invariant: pure arithmetic on counts that all ranks agree on, so that all ranks stop at the same step; the counts are a few integers
in the checkpoint's totals, so that a resumed life goes on counting.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.config import ErrorConfig
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.loader import StepData

_COUNTS = ("segments", "dropped", "stretch_segments", "stretch_dropped")


def check(budgets: Mapping[str, ErrorConfig]) -> None:
    """Refuses budgets that count nothing.

    Raises:
        UserError: which, and what it may be.
    """
    for name, budget in budgets.items():
        key = f"data.sources.{name}.errors"
        if not 0 <= budget.share <= 1:
            raise UserError(f"{key}.share: {budget.share:g} is no share (give 0 to 1)")
        if budget.segments < 1 or (budget.total is not None and budget.total < 0):
            raise UserError(f"{key}: segments must be at least 1 and total at least 0 (raise them)")


def charges(step: "StepData", names: Sequence[str]) -> list[int]:
    """Planned, then dropped segments of this rank's part of a step, by source: 2 * sources integers to be summed over ranks."""
    planned = np.zeros(len(names), np.int64)
    for micro_batch in step.micro_batches:
        for pieces in micro_batch.request.packs:
            planned += np.bincount(pieces.source, minlength=len(names))
    dropped = [sum(entry.source == name for entry in step.bad) for name in names]
    return [*planned.tolist(), *dropped]


def charged(totals: Mapping[str, int], budgets: Mapping[str, ErrorConfig], agreed: Sequence[int]) -> dict[str, int]:
    """The totals of a run after a step whose `charges`, summed over ranks, are `agreed`. Sources come in the order of `budgets`."""
    found = dict(totals)
    for i, (name, budget) in enumerate(budgets.items()):
        segments, dropped, stretch_segments, stretch_dropped = (found.get(_key(name, count), 0) for count in _COUNTS)
        if stretch_segments >= budget.segments:
            stretch_segments = stretch_dropped = 0
        now, lost = agreed[i], agreed[len(budgets) + i]
        values = (segments + now, dropped + lost, stretch_segments + now, stretch_dropped + lost)
        found.update({_key(name, count): value for count, value in zip(_COUNTS, values, strict=True)})
    return found


def overdrawn(totals: Mapping[str, int], budgets: Mapping[str, ErrorConfig]) -> str | None:
    """What is over its budget, and by how much; None where nothing is."""
    for name, budget in budgets.items():
        dropped, stretch = totals.get(_key(name, "dropped"), 0), totals.get(_key(name, "stretch_dropped"), 0)
        if budget.total is not None and dropped > budget.total:
            return f"{dropped} segments of source {name} could not be used, more than data.sources.{name}.errors.total = {budget.total}"
        if stretch > Fraction(str(budget.share)) * budget.segments:
            of = totals[_key(name, "stretch_segments")]
            return (
                f"{stretch} of the last {of} segments of source {name} could not be used, more than "
                f"data.sources.{name}.errors.share = {budget.share:g} of {budget.segments}"
            )
    return None


def _key(name: str, count: str) -> str:
    return f"source/{name}/{count}"
