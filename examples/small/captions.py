"""What a caption of the small data says: a category and a label, `animal bird: parrot`.

Invariant: pure functions of the words.
"""

import posixpath
import re

ARTICLE = re.compile(r"^(an?|the) ")
VARIANT = re.compile(
    "black|white|red|green|blue|yellow|orange|purple|pink|brown|gr[ea]y|colou?r(ed)?|dark|light|bw?|w|amp"
    "|left|right|upper|lower|small|large|big"
)
"""Words by which drawings of one thing are told apart."""


def label_of(caption: str) -> str:
    """A caption without category, article and case."""
    return ARTICLE.sub("", (caption.partition(": ")[2] or caption).lower())


def thing_of(caption: str) -> str:
    """A label without brackets, numbers, colours, sides and sizes: `led square (red)` and `led square (blue)` are drawings of one thing."""
    label = label_of(caption)
    words = re.findall(r"[^\W\d_]+", re.sub(r"\([^)]*\)", " ", label))
    return " ".join(word for word in words if not VARIANT.fullmatch(word)) or label


def category_of(caption: str) -> str:
    """Where its source files the picture of a caption; empty if nowhere."""
    category, colon, _ = caption.partition(": ")
    return category if colon else ""


def filed_under(name: str) -> str:
    """The folders of a file as a category: `animals/birds/x.png` under `animals birds`."""
    return posixpath.dirname(name).replace("/", " ").replace("_", " ").replace("-", " ").lower()
