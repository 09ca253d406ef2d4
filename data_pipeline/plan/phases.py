"""How many samples of each source are drawn before any window, where the mix changes in the course of a run.

Invariant: `Q_s(w) = base_s + floor(1/2 + sum_i rho_{s,i} |[w_0, w) and phase_i|)`: a closed formula of the window's number, off the
exact sum by at most one half at every border of a window, those of phases included.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import floor


@dataclass(frozen=True)
class Phase:
    """Weights that hold from a given progress on."""

    at: Fraction
    """Share of the run that is done when the phase begins, at the next border of a window; above 0 and below 1."""
    weights: tuple[Fraction, ...]
    """By source."""


@dataclass(frozen=True)
class PlannedPhase:
    """Windows with constant rates, up to the beginning of the next phase."""

    begin: int
    """First window."""
    weights: tuple[Fraction, ...]
    """By source."""
    rates: tuple[Fraction, ...]
    """Draws of each source a window."""
    draws: int
    """Draws of a window, on average."""


class Quotas:
    """Draws of each source before any window."""

    def __init__(self, base: Sequence[int], first: PlannedPhase) -> None:
        """`base`: draws of each source before the first window of the first phase."""
        self.phases = [first]
        self._drawn = [[Fraction(draws) for draws in base]]
        """Exact draws of each source before each phase."""

    def add(self, phase: PlannedPhase) -> None:
        """Appends a phase, which begins after the one before it."""
        self._drawn.append(self._exact(phase.begin))
        self.phases.append(phase)

    def before(self, w: int) -> list[int]:
        """Draws of each source before window w, which is not before the first phase."""
        return [floor(drawn + Fraction(1, 2)) for drawn in self._exact(w)]

    def _exact(self, w: int) -> list[Fraction]:
        i = bisect_right(self.phases, w, key=lambda phase: phase.begin) - 1
        phase = self.phases[i]
        return [drawn + rate * (w - phase.begin) for drawn, rate in zip(self._drawn[i], phase.rates, strict=True)]


def check(phases: Sequence[Phase], sources: int, unit: str, steps: int | None) -> None:
    """Raises ValueError for phases that no plan can follow."""
    if not phases:
        return
    if unit == "epochs":
        raise ValueError("epochs count over the whole run and set its length, so that phases have no place in it; use samples or tokens")
    if steps is None:
        raise ValueError("phases begin at a share of the run, whose length is not known; give train.steps")
    places = [Fraction(0), *(phase.at for phase in phases), Fraction(1)]
    for before, at in pairwise(places):
        if not before < at:
            raise ValueError(f"a phase begins at {float(min(before, at)):g}: phases begin above 0 and below 1, each after the one before")
    if any(len(phase.weights) != sources for phase in phases):
        raise ValueError(f"a phase needs a weight for each of the {sources} sources")
