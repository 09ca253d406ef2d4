"""How a sample reads: begin, elements in order, end; and which of its tokens are supervised.

Invariant: rendering costs exactly the tokens that the plan counted: `OVERHEAD` and the elements' own lengths.
One format serves pairs, documents and plain text: image positions are never targets, every word and the end are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.samples import BadSample, Element, TextElement
from data_pipeline.text.tokenizer import Tokenizer

OVERHEAD = 2
"""Begin and end token; a piece that does not end its sample has no end token and stays one under its count."""
VERSION = "plain-1"
"""Part of the plan digest: another way to render is another batch."""


@dataclass(frozen=True)
class Bounds:
    """Where a piece begins and ends in its sample: token `start_offset` of element `start_element` up to (end_element, end_offset)."""

    start_element: int
    start_offset: int
    end_element: int
    end_offset: int
    last: bool


@dataclass(frozen=True)
class Rendered:
    """A piece as token ids; n tokens."""

    ids: np.ndarray
    """[n] int64; image positions hold the end token."""
    supervised: np.ndarray
    """[n] bool: this token is to be predicted from the one before."""
    image_positions: np.ndarray
    """[V] int64: positions of image tokens, in order."""
    images: tuple[int, ...]
    """Element numbers of the images, in order."""


def whole(elements: Sequence[Element]) -> Bounds:
    """The bounds of a sample that is one piece."""
    return Bounds(0, 0, len(elements), 0, True)


def render(elements: Sequence[Element], bounds: Bounds, tokenizer: Tokenizer, image_tokens: int) -> Rendered:
    """Begin, the elements within `bounds`, and the end where the piece ends its sample.

    Raises:
        BadSample: the elements are not those that were indexed.
    """
    runs: list[Sequence[int] | np.ndarray] = [(tokenizer.begin,)]
    words, images, places, length = [False], [], [], 1
    stop = bounds.end_element + (1 if bounds.end_offset else 0)
    if stop > len(elements):
        raise BadSample(f"sample has {len(elements)} elements, the index says at least {stop}")
    for number in range(bounds.start_element, stop):
        element = elements[number]
        if isinstance(element, TextElement):
            first = bounds.start_offset if number == bounds.start_element else 0
            last = bounds.end_offset if number == bounds.end_element else None
            tokens = tokenizer.encode(element.text)[first:last]
            runs.append(tokens)
            words.append(True)
        else:
            runs.append(np.full(image_tokens, tokenizer.end))
            words.append(False)
            images.append(number)
            places.append(length)
        length += len(runs[-1])
    if bounds.last:
        runs.append((tokenizer.end,))
        words.append(True)
    ids = np.concatenate([np.asarray(run, np.int64) for run in runs])
    supervised = np.repeat(words, [len(run) for run in runs])
    image_positions = np.add.outer(np.asarray(places, np.int64), np.arange(image_tokens)).ravel()
    return Rendered(ids, supervised, image_positions, tuple(images))
