"""What a caption of the small data says: a category and a label, `animal bird: parrot`.

Invariant: pure functions of the words.
"""

import posixpath
import re

ARTICLE = re.compile(r"^(an?|the) ")


def label_of(caption: str) -> str:
    """A caption without category, article and case."""
    return ARTICLE.sub("", (caption.partition(": ")[2] or caption).lower())


def category_of(caption: str) -> str:
    """Where its source files the picture of a caption; empty if nowhere."""
    category, colon, _ = caption.partition(": ")
    return category if colon else ""


def filed_under(name: str) -> str:
    """The folders of a file as a category: `animals/birds/x.png` under `animals birds`."""
    return posixpath.dirname(name).replace("/", " ").replace("_", " ").replace("-", " ").lower()
