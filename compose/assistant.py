"""A trained model to talk to: turns of words and pictures in, an answer out.

Invariant: what the model reads is what training shows it before an answer, token for token (data_pipeline/text/templates.py); a prompt
that does not fit the length it was trained on is refused, never cut in silence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compose.pictures import Picture
from data_pipeline.batch import Segment
from data_pipeline.config import ImageConfig
from data_pipeline.errors import UserError
from data_pipeline.read import images
from data_pipeline.samples import AnswerEndElement, Element, ImageElement, Role, TextElement, TurnElement, is_unicode
from data_pipeline.text.templates import Bounds, Rendered, chat_format, render
from data_pipeline.text.tokenizer import Tokenizer
from train.config import Stage
from train.generate import GREEDY, Sampling, generate, next_logits
from train.model.xcomposer2 import XComposer2
from train.weights.opened import Opened, open_model, read_config

Parts = Sequence[str | Picture]
"""What one turn says, in order."""


@dataclass(frozen=True)
class Turn:
    """Who speaks, and what."""

    role: Role
    parts: Parts


@dataclass(frozen=True)
class Said:
    """An answer."""

    text: str
    whole: bool
    """The model ended it; otherwise the limit on its length did."""


class _Teller:
    """Tells an answer while it is written, in pieces that together are its text."""

    def __init__(self, tokenizer: Tokenizer, hear: Callable[[str], None]) -> None:
        self._tokenizer, self._hear = tokenizer, hear
        self._ids: list[int] = []
        self._told = ""

    def word(self, _: int, token: int) -> None:
        """One token more; what it may still change is kept back: half a character, blanks at the end."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids).strip()
        if text.startswith(self._told) and not text.endswith("\ufffd"):
            self._hear(text[len(self._told) :])
            self._told = text

    def end(self, text: str) -> None:
        """What was kept back; on a new line the whole text, where half a character at its end has made another of it."""
        self._hear(text.removeprefix(self._told) if text.startswith(self._told) else f"\n{text}")


LEAST_ROOM = 8
"""Tokens that must be left for an answer."""


class Prompter:
    """What is known of a model before its weights are read: how it is asked, and what it cannot be asked."""

    def __init__(self, tokenizer: Tokenizer, images: ImageConfig, context: int, stage: Stage) -> None:
        """`context` is the longest text that the model was trained on, in tokens."""
        self.tokenizer, self.images, self.context, self.stage = tokenizer, images, context, stage

    def room(self, turns: Sequence[Turn]) -> int:
        """Tokens that the context leaves for an answer; the last turn is a user's.

        Raises:
            UserError: too few, or there are pictures and the model never saw one.
        """
        seen = sum(isinstance(part, Picture) for turn in turns for part in turn.parts)
        if seen:
            self.require_sight()
        length = self.length(turns)
        if self.context - length < LEAST_ROOM:
            cure = f"shorten it, or show fewer than its {seen} pictures" if seen else "shorten it"
            raise UserError(f"{length} tokens of prompt are too many for a model that was trained on {self.context} ({cure})")
        return self.context - length

    def fits(self, turns: Sequence[Turn], answer: int = LEAST_ROOM) -> bool:
        """Whether the context leaves so many tokens for an answer."""
        return self.length(turns) + answer <= self.context

    def length(self, turns: Sequence[Turn]) -> int:
        """Tokens of a prompt, pictures included."""
        return len(self._render(_elements(turns)).ids)

    def require_sight(self) -> None:
        """Refuses a model that was trained on text alone.

        Raises:
            UserError: it was.
        """
        if self.stage is Stage.language:
            raise UserError("this is a checkpoint of stage language, which has seen no picture (take one of pretrain, sft or compose)")

    @property
    def obeys(self) -> bool:
        """Whether the model was trained to follow instructions."""
        return self.stage in (Stage.sft, Stage.compose)

    def require_obedience(self) -> None:
        """Refuses a model that was not trained to follow instructions.

        Raises:
            UserError: it was not.
        """
        if not self.obeys:
            what = f"a checkpoint of stage {self.stage.value}, which was not trained to follow instructions"
            raise UserError(f"this is {what} (take one of sft or compose)")

    def _render(self, elements: Sequence[Element], last: bool = False) -> Rendered:
        return render(elements, Bounds(0, 0, len(elements), 0, last), self.tokenizer, self._image_tokens)

    def _image_tokens(self, element: ImageElement) -> int:
        return images.image_tokens(element.data, self.images)


class Assistant(Prompter):
    """A model, its tokenizer and its image policy."""

    def __init__(self, model: XComposer2, tokenizer: Tokenizer, images: ImageConfig, context: int, stage: Stage, weights: str) -> None:
        """As `Prompter`; `weights` is the digest of the model's weights."""
        super().__init__(tokenizer, images, context, stage)
        self.model, self.weights = model.eval(), weights
        ends = tokenizer.encode_template(chat_format(tokenizer).end_answer)
        self._stop = ends if len(ends) == 1 else []

    def answer(
        self, turns: Sequence[Turn], max_tokens: int, sampling: Sampling = GREEDY, hear: Callable[[str], None] | None = None
    ) -> Said:
        """What the model says next; the last turn is a user's.

        It is no longer than `max_tokens`, nor than the context leaves room for. `hear` is told its text piece by piece, as it is written.

        Raises:
            UserError: as `room`.
        """
        max_tokens = min(max_tokens, self.room(turns))
        teller = _Teller(self.tokenizer, hear or (lambda _: None))
        prompts = [self._prompt(turns)]
        answer = generate(self.model, prompts, self.tokenizer, max_tokens, self._stop, sampling, hear=teller.word if hear else None)[0]
        said = Said(self.tokenizer.decode(answer.ids).strip(), answer.stopped)
        teller.end(said.text)
        return said

    def spoken(self, turns: Sequence[Turn], answer: str) -> Segment:
        """The turns and an answer, which alone is supervised: what training shows."""
        elements = [*_elements(turns), TextElement(answer.strip()), AnswerEndElement(last=True)]
        return self._segment(turns, self._render(elements, last=True))

    def likeliest(self, turns: Sequence[Turn], options: Sequence[str]) -> int:
        """Which of the options' first tokens the model would rather begin its answer with.

        Raises:
            UserError: as `room`.
        """
        self.room(turns)
        logits = next_logits(self.model, [self._prompt(turns)], self.tokenizer)[0]
        return max(range(len(options)), key=lambda i: float(logits[self.tokenizer.encode(options[i])[0]]))

    def _prompt(self, turns: Sequence[Turn]) -> Segment:
        return self._segment(turns, self._render(_elements(turns)))

    def _segment(self, turns: Sequence[Turn], rendered: Rendered) -> Segment:
        pictures = [part for turn in turns for part in turn.parts if isinstance(part, Picture)]
        if pictures:
            self.require_sight()
        seen = [images.load(picture.data, self.images, None) for picture in pictures]
        tiles = tuple(tile for picture in seen for tile in picture.tiles)
        return Segment(rendered, tiles, 0, 0, tuple(grid for picture in seen for grid in picture.grids))


def ask(*parts: str | Picture) -> list[Turn]:
    """A conversation of one question."""
    return [Turn(Role.user, parts)]


def prompter(checkpoint: Path) -> Prompter:
    """How the model of a checkpoint is asked, from its config and tokenizer alone.

    Raises:
        UserError: as `read_config`, or the tokenizer is not there.
    """
    config = read_config(checkpoint)
    return Prompter(Tokenizer(config.data.tokenizer), config.data.images, config.data.context, config.run.stage)


def load(checkpoint: Path) -> Assistant:
    """The model of a run directory, of RUN/checkpoints/step-N, or of an exported folder.

    Raises:
        UserError: as `open_model`.
    """
    return of(open_model(checkpoint))


def of(opened: Opened) -> Assistant:
    """A model that was opened, to talk to."""
    data = opened.config.data
    return Assistant(opened.model, opened.tokenizer, data.images, data.context, opened.config.run.stage, opened.weights)


def _elements(turns: Sequence[Turn]) -> list[Element]:
    """The turns as a sample's elements, up to where the assistant would begin to speak."""
    elements: list[Element] = []
    before: Role | None = None
    for turn in turns:
        elements.append(TurnElement(before, turn.role))
        parts = _joined(turn.parts)
        for number, part in enumerate(parts):
            if isinstance(part, Picture):
                elements.append(ImageElement(part.data))
                continue
            first, last = number == 0, number == len(parts) - 1
            text = part.lstrip() if first else part
            text = text.rstrip() if last else text
            if not is_unicode(text):
                raise UserError("the question is not Unicode: half a surrogate pair, or bytes that are not UTF-8 (mend it)")
            if text:
                elements.append(TextElement(text, supervised=turn.role is Role.assistant))
        if turn.role is Role.assistant:
            elements.append(AnswerEndElement(last=False))
        before = turn.role
    return [*elements, TurnElement(before, Role.assistant)]


def _joined(parts: Sequence[str | Picture]) -> Parts:
    """Neighbouring words as one text: training encodes what stands between two pictures at once, and tokens may cross a border."""
    joined: list[str | Picture] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined
