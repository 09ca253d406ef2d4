"""How much of each source a window gets.

Invariant: every mix is one exact rational rate a source, in draws a window: no rounding error ever adds up.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import floor

UNITS = ("samples", "tokens", "epochs")
REPEAT_SHARE = Fraction(1, 20)
"""A source that gives more than this share of the draws may not repeat inside a window."""


def shares(
    unit: str, weights: Sequence[Fraction], sizes: Sequence[int], mean_tokens: Sequence[Fraction], drawn: Sequence[int] = ()
) -> list[Fraction]:
    """Share of each source in the draws; they sum to 1.

    `weights` count samples, tokens or epochs, as `unit` says; `sizes` are kept samples, `mean_tokens` theirs, images included; of
    epochs, `drawn` samples of each source are done already (none by default). Raises ValueError for a mix that draws nothing or that
    no rate can honour.
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
        parts = [Fraction(draws) for draws in epoch_draws(weights, sizes, drawn)]
    total = sum(parts)
    if total == 0 and unit == "epochs" and any(drawn):
        raise ValueError("the mix draws no sample: all its epochs are done")
    if total == 0:
        raise ValueError("the mix draws no sample: no weight is positive, or less than one sample is asked for")
    return [Fraction(part, total) for part in parts]


def epoch_draws(weights: Sequence[Fraction], sizes: Sequence[int], drawn: Sequence[int] = ()) -> list[int]:
    """Draws of each source that a mix of epochs has left after `drawn` of them; a fraction of a sample is left out."""
    done = drawn or [0] * len(sizes)
    return [max(0, floor(weight * size) - before) for weight, size, before in zip(weights, sizes, done, strict=True)]


def epoch_windows(weights: Sequence[Fraction], sizes: Sequence[int], window: int, drawn: Sequence[int] = ()) -> int:
    """Windows that a mix of epochs has left: it sets its own length."""
    return -(-sum(epoch_draws(weights, sizes, drawn)) // window)


def window_draws(draw_shares: Sequence[Fraction], sizes: Sequence[int], window: int) -> int:
    """`window`, or fewer draws where a source above REPEAT_SHARE would otherwise give more than all its samples; at least 1."""
    caps = [floor(size / share) for share, size in zip(draw_shares, sizes, strict=True) if share > REPEAT_SHARE]
    return max(1, min([window, *caps]))


def rates(
    unit: str,
    weights: Sequence[Fraction],
    sizes: Sequence[int],
    mean_tokens: Sequence[Fraction],
    window: int,
    drawn: Sequence[int] = (),
) -> list[Fraction]:
    """Exact draws of each source a window, where a window has `window` draws on average (of epochs: at most)."""
    if unit == "epochs":
        windows = epoch_windows(weights, sizes, window, drawn)
        return [Fraction(draws, windows) for draws in epoch_draws(weights, sizes, drawn)]
    return [window * share for share in shares(unit, weights, sizes, mean_tokens)]
