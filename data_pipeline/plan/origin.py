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
class Drawn:
    """Draws by source around a cursor: enough to go on where the plan that drew them can no longer be built."""

    before: Mapping[str, int]
    """Draws before the cursor's window."""
    after: Mapping[str, int]
    """Draws before the window after that."""
    digests: Mapping[str, str]
    """Digest of each source."""

    def origin(self, cursor: Cursor, step: int, repeat: bool) -> Origin:
        """Where the next plan takes over: at the cursor's window, which is drawn again, or (`repeat` false) after it.

        A cursor between two windows interrupts none, and the choice makes no difference. `step` counts the steps done.
        """
        if cursor.pack and not repeat:
            return Origin(cursor.window + 1, step, self.after)
        return Origin(cursor.window, step, self.before)

    def change(self, cursor: Cursor, repeat: bool, digests: Mapping[str, str]) -> str:
        """What going on with the sources `digests` means for the data, in one line."""
        counts = {name: after - self.before.get(name, 0) for name, after in self.after.items()}
        window = f"window {cursor.window} ({', '.join(f'{name} {n}' for name, n in counts.items() if n)} samples)"
        if not cursor.pack:
            said = [f"it takes over between windows, at {cursor.window}: nothing is repeated or skipped"]
        elif repeat:
            said = [f"{window} is drawn again: what its first {cursor.pack} packs held is repeated"]
        else:
            said = [f"{window} is left after {cursor.pack} packs: what its other packs held is skipped"]
        for name, digest in digests.items():
            if name not in self.digests:
                said.append(f"{name} goes on after {self.before[name]} draws" if name in self.before else f"{name} is new")
            elif self.digests[name] != digest:
                said.append(f"the samples of {name} changed: some may come twice in an epoch, others not at all")
        kept = self.origin(cursor, 0, repeat).ordinals
        said += [f"{name} stops after {kept[name]} draws" for name in self.digests if name not in digests]
        return "; ".join(said)
