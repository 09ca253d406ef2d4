"""How the samples of a source read, in a line each: their special tokens, words and images in order, with what is supervised.

Invariant: pure; a pattern says less than its cards, never something else. A template that went wrong shows in the first line of a page.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.inspect.packs import Card, PackView

SHOWN = 3
"""Patterns of a source that are shown, the most frequent first."""


@dataclass(frozen=True)
class Token:
    """What stands in one place of a pattern."""

    kind: str
    """`text`, `special` or `image`."""
    text: str
    supervised: bool


@dataclass(frozen=True)
class Pattern:
    """A way in which segments read."""

    runs: tuple[tuple[tuple[Token, ...], bool], ...]
    """(what stands there, whether it comes several times in a row)."""
    segments: int


def patterns(packs: Sequence[PackView]) -> dict[int, tuple[list[Pattern], int]]:
    """By source: its most frequent patterns, and how many others there are. Dropped segments read in no way."""
    found: dict[int, Counter[tuple[tuple[tuple[Token, ...], bool], ...]]] = {}
    for card in (card for pack in packs for card in pack.cards if not card.dropped):
        found.setdefault(card.source, Counter())[fold(tokens_of(card))] += 1
    return {
        source: ([Pattern(runs, count) for runs, count in counts.most_common(SHOWN)], max(0, len(counts) - SHOWN))
        for source, counts in sorted(found.items())
    }


def tokens_of(card: Card) -> list[Token]:
    """The parts of a card without their content; special tokens keep their names."""
    return [Token(p.kind, p.text if p.kind == "special" else {"text": "words", "image": "image"}[p.kind], p.supervised) for p in card.parts]


def fold(tokens: Sequence[Token]) -> tuple[tuple[tuple[Token, ...], bool], ...]:
    """The tokens with repeats of one or two of them drawn together: a b a b a c -> (a b)+ a c."""
    runs: list[tuple[tuple[Token, ...], bool]] = []
    at = 0
    while at < len(tokens):
        for size in (1, 2):
            unit = tuple(tokens[at : at + size])
            end = at + size
            while len(unit) == size and tuple(tokens[end : end + size]) == unit:
                end += size
            if end > at + size:
                runs.append((unit, True))
                break
        else:
            end = at + 1
            runs.append(((tokens[at],), False))
        at = end
    return tuple(runs)
