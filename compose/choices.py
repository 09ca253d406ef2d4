"""Questions with lettered answers out of a JSONL, a question a line, in the layout of MMBench or of SEED-Bench.

Invariant: a file is read whole and checked before a model is loaded; what is wrong with it is one line that names the line.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compose import pictures, prompts
from compose.assistant import Parts
from compose.pictures import Picture
from data_pipeline.errors import UserError
from data_pipeline.samples import is_unicode

LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Question:
    """One question."""

    name: str
    category: str
    parts: Parts
    """What the model is asked."""
    options: int
    answer: int
    """Number of the right option."""


def read(file: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: it cannot be read, or a line is no such question.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {file.absolute()}: {reason} (give a JSONL of questions)") from None
    images: dict[str, str] = {}
    found = [_question(line, file, number, images) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"no question in {file.absolute()} (give a JSONL of questions)")
    return found


def _question(line: str, file: Path, number: int, images: dict[str, str]) -> Question:
    """`images`: those of the lines before by their index, which MMBench gives in place of a picture that it repeats."""
    where = f"{file.absolute()}, line {number}"
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
        seed = "choice_a" in row
        given = (row.get(f"choice_{letter.lower()}" if seed else letter) for letter in LETTERS)
        options = [str(option) for option in takewhile(_is_option, given)]
        name, category = ("question_id", "question_type_id") if seed else ("index", "category")
        image = _named(row, "data_id" if seed else "image")
        image = images.get(image, image)
        images[str(row.get("index", where))] = image
        words = prompts.letter("\n".join(filter(None, (_words(row.get("hint")), str(row["question"])))), options)
        if not is_unicode(words):
            raise ValueError("half a surrogate pair in its words")
        return Question(
            str(row.get(name, number)),
            str(row.get(category, "-")),
            [*_picture(row, image, seed, file, where), words],
            len(options),
            _answer(row, options),
        )
    except (ValueError, KeyError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: {what} (see xc-compose eval --help for the layout)") from None


def _is_option(value: object) -> bool:
    """Not one of the ways that a table has of saying that there is none: null, NaN, nothing."""
    return value is not None and value == value and value != ""


def _answer(row: dict[str, Any], options: list[str]) -> int:
    answer = str(row["answer"]).strip().upper()
    if len(options) < 2 or len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise ValueError(f"the answer {answer!r} is none of {len(options)} options")
    return LETTERS.index(answer)


def _picture(row: dict[str, Any], image: str, seed: bool, file: Path, where: str) -> list[Picture]:
    """A file beside the JSONL, or base64; SEED-Bench names files, whose names have no extension (1454426_2591111986)."""
    if row.get("data_type", "image") != "image":
        raise ValueError(f"it is about a {row['data_type']}, not an image")
    if not image:
        return []
    if seed or image.lower().endswith(pictures.EXTENSIONS):
        return pictures.read([file.parent / image])
    try:
        return [pictures.decoded("image", base64.b64decode(image, validate=True), f"the image of {where}")]
    except binascii.Error:
        raise ValueError("its image is neither base64 nor the name of a file") from None


def _named(row: dict[str, Any], key: str) -> str:
    """What names or is a picture, or nothing where none is given."""
    value = row.get(key)
    if _is_option(value) and not isinstance(value, str):
        raise ValueError(f"its {key}, {value!r}, is no text")
    return _words(value)


def _words(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""
