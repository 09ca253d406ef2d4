"""A change of plan: what a checkpoint keeps of one plan, so that another one can take over from it.

Invariant: draws are counted by source and never from zero again: whatever mix, sources or global batch take over, a source goes on at
the draw that the change names, and nothing but the rest or the beginning of the interrupted window is left out or drawn twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in the plan: the next pack to consume."""

    window: int
    pack: int


@dataclass(frozen=True)
class Origin:
    """Where a plan takes over; the start of the run by default."""

    window: int = 0
    """Its first window."""
    step: int = 0
    """Steps that the run had done by then."""
    ordinals: Mapping[str, int] = field(default_factory=dict)
    """Draws before that window, by source, sources that are no longer drawn included; 0 where a source is not named."""


@dataclass(frozen=True)
class Place:
    """A cursor as draws by source: enough to go on where the plan that it belongs to can no longer be built."""

    cursor: Cursor
    before: Mapping[str, int]
    """Draws before the cursor's window."""
    after: Mapping[str, int]
    """Draws before the window after that."""
    digests: Mapping[str, str]
    """Digest of each source."""

    def origin(self, step: int, repeat: bool) -> Origin:
        """Where the next plan takes over: at the cursor's window, which is drawn again, or (`repeat` false) after it.

        A cursor between two windows interrupts none, and the choice makes no difference. `step` counts the steps done.
        """
        if self.cursor.pack and not repeat:
            return Origin(self.cursor.window + 1, step, self.after)
        return Origin(self.cursor.window, step, self.before)

    def change(self, repeat: bool, digests: Mapping[str, str]) -> str:
        """What going on with the sources `digests` means for the data, in one line."""
        window, pack = self.cursor.window, self.cursor.pack
        draws = {name: n for name in self.after if (n := self.after[name] - self.before.get(name, 0))}
        drawn = ", ".join(f"{name} {n}" for name, n in draws.items())
        if not pack:
            said = [f"it takes over between windows, at {window}: nothing is repeated or skipped"]
        elif repeat:
            said = [f"window {window} ({drawn} samples) is drawn again: what its first {pack} packs held is repeated"]
        else:
            said = [f"window {window} ({drawn} samples) is left after {pack} packs: what its other packs held is skipped"]
        for name, digest in digests.items():
            if name not in self.digests:
                said.append(f"{name} goes on after {self.before[name]} draws" if name in self.before else f"{name} is new")
            elif self.digests[name] != digest:
                said.append(f"the samples of {name} changed: some may come twice in an epoch, others not at all")
        said += [
            f"{name} stops after {(self.before if repeat else self.after)[name]} draws" for name in self.digests if name not in digests
        ]
        return "; ".join(said)
