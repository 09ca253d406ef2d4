"""How much of each source a window gets.

Invariant: every mix is one exact rational rate a source, in draws a window, and the draws before any window are a closed formula
of its number: windows are addressable directly, and no rounding error ever adds up.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

UNITS = ("samples", "tokens", "epochs")
REPEAT_SHARE = Fraction(1, 20)
"""A source that gives more than this share of the draws may not repeat inside a window."""


def shares(unit: str, weights: Sequence[Fraction], sizes: Sequence[int], mean_tokens: Sequence[Fraction]) -> list[Fraction]:
    """Share of each source in the draws; they sum to 1.

    `weights` count samples, tokens or epochs, as `unit` says; `sizes` are kept samples, `mean_tokens` theirs, images included.
    Raises ValueError for a mix that draws nothing or that no rate can honour.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is none of {', '.join(UNITS)}")
    if any(weight < 0 for weight in weights):
        raise ValueError("a weight is negative")
    if unit == "samples":
        parts = list(weights)
    elif unit == "tokens":
        if any(weight > 0 and mean <= 0 for weight, mean in zip(weights, mean_tokens, strict=True)):
            raise ValueError("a source without tokens cannot have a share of tokens")
        parts = [weight / mean if weight else Fraction(0) for weight, mean in zip(weights, mean_tokens, strict=True)]
    else:
        parts = [Fraction(draws) for draws in epoch_draws(weights, sizes)]
    total = sum(parts)
    if total == 0:
        raise ValueError("the mix draws no sample: no weight is positive, or less than one sample is asked for")
    return [Fraction(part, total) for part in parts]


def epoch_draws(weights: Sequence[Fraction], sizes: Sequence[int]) -> list[int]:
    """Draws of each source over a whole mix of epochs; a fraction of a sample is left out."""
    return [floor(weight * size) for weight, size in zip(weights, sizes, strict=True)]


def epoch_windows(weights: Sequence[Fraction], sizes: Sequence[int], window: int) -> int:
    """Windows of a mix of epochs, which sets its own length."""
    return -(-sum(epoch_draws(weights, sizes)) // window)


def window_draws(draw_shares: Sequence[Fraction], sizes: Sequence[int], window: int) -> int:
    """`window`, or fewer draws where a source above REPEAT_SHARE would otherwise give more than all its samples; at least 1."""
    caps = [floor(size / share) for share, size in zip(draw_shares, sizes, strict=True) if share > REPEAT_SHARE]
    return max(1, min([window, *caps]))


def rates(unit: str, weights: Sequence[Fraction], sizes: Sequence[int], mean_tokens: Sequence[Fraction], window: int) -> list[Fraction]:
    """Exact draws of each source a window, where a window has `window` draws on average (of epochs: at most)."""
    if unit == "epochs":
        windows = epoch_windows(weights, sizes, window)
        return [Fraction(draws, windows) for draws in epoch_draws(weights, sizes)]
    return [window * share for share in shares(unit, weights, sizes, mean_tokens)]


def quota(rate: Fraction, w: int) -> int:
    """Draws of a source before window w, off the exact rate by at most one half; window w draws from here to the quota of w + 1."""
    return (2 * rate.numerator * w + rate.denominator) // (2 * rate.denominator)
