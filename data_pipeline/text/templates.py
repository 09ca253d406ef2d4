"""How a sample reads: begin, elements in order, end; and which of its tokens are supervised.

Invariant: rendering costs exactly the tokens that the plan counted: `config.OVERHEAD` and the elements' own lengths, each encoded alone by
`encode`, which the index uses too. Image positions are never targets. Of pairs, documents and plain text every word and the end are;
of conversations what the assistant says, and that it stops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.samples import AnswerEndElement, BadSample, Element, ImageElement, MarkerElement, Role, TextElement, TurnElement
from data_pipeline.text.tokenizer import Tokenizer

VERSION = "plain-1"
"""Part of the plan digest: another way to render is another batch. Where lengths change too, so must the index's version."""


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the turns of a conversation, special tokens written out."""

    user: str
    """Opens a user's turn."""
    assistant: str
    """Opens an assistant's turn."""
    end_user: str
    """Closes a user's turn."""
    end_answer: str
    """Closes an assistant's turn; supervised."""
    after_answer: str
    """Follows `end_answer` where another turn comes; not supervised."""
    end_last: str
    """Closes the last turn, if an assistant's, before the end token; supervised."""


def _turn_tokens(begin: str, end: str) -> ChatFormat:
    return ChatFormat(f"{begin}user\n", f"{begin}assistant\n", f"{end}\n", end, "\n", f"{end}\n")


TURN_TOKENS = (("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"), ("<|im_start|>", "<|im_end|>"))
"""Begin and end of a turn: as InternLM-XComposer2 calls them, and as InternLM2-Chat and others do."""
PLAIN = ChatFormat("User:\n", "Assistant:\n", "\n", "</s>", "\n", "")
"""For vocabularies that have neither: an answer ends as a text does."""


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """The first format whose tokens the vocabulary has; the tokenizer's digest therefore covers the choice."""
    return next((_turn_tokens(*pair) for pair in TURN_TOKENS if all(map(tokenizer.knows, pair))), PLAIN)


def encode(element: TextElement | MarkerElement, tokenizer: Tokenizer) -> list[int]:
    """Token ids of one element that is no image, whatever stands beside it."""
    if isinstance(element, TextElement):
        return tokenizer.encode(element.text)
    return tokenizer.encode_template(_words(element, chat_format(tokenizer)))


def _words(marker: MarkerElement, chat: ChatFormat) -> str:
    if isinstance(marker, AnswerEndElement):
        return chat.end_last if marker.last else chat.end_answer
    closing = {None: "", Role.user: chat.end_user, Role.assistant: chat.after_answer}
    opening = {None: "", Role.user: chat.user, Role.assistant: chat.assistant}
    return closing[marker.before] + opening[marker.after]


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


def render(
    elements: Sequence[Element], bounds: Bounds, tokenizer: Tokenizer, image_tokens: int | Callable[[ImageElement], int]
) -> Rendered:
    """Begin, the elements within `bounds`, and the end where the piece ends its sample; `image_tokens` of every image, or by image.

    Raises:
        BadSample: the elements are not those that were indexed.
    """
    runs: list[Sequence[int] | np.ndarray] = [(tokenizer.begin,)]
    words, images, places, length = [False], [], [np.empty(0, np.int64)], 1
    stop = bounds.end_element + (1 if bounds.end_offset else 0)
    if stop > len(elements):
        raise BadSample(f"sample has {len(elements)} elements, the index says at least {stop}")
    for number in range(bounds.start_element, stop):
        element = elements[number]
        if isinstance(element, ImageElement):
            count = image_tokens if isinstance(image_tokens, int) else image_tokens(element)
            runs.append(np.full(count, tokenizer.end))
            words.append(False)
            images.append(number)
            places.append(np.arange(length, length + count))
        else:
            first = bounds.start_offset if number == bounds.start_element else 0
            last = bounds.end_offset if number == bounds.end_element else None
            runs.append(encode(element, tokenizer)[first:last])
            words.append(_is_learnt(element))
        length += len(runs[-1])
    if bounds.last:
        runs.append((tokenizer.end,))
        words.append(not isinstance(elements[-1], TurnElement))  # nobody answered: nothing was said that could end
    ids = np.concatenate([np.asarray(run, np.int64) for run in runs])
    supervised = np.repeat(words, [len(run) for run in runs])
    return Rendered(ids, supervised, np.concatenate(places), tuple(images))


def _is_learnt(element: TextElement | MarkerElement) -> bool:
    return element.supervised if isinstance(element, TextElement) else isinstance(element, AnswerEndElement)
