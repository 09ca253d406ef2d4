"""Vectors to find by: lengths and centres, and sentence embeddings by WordLlama, word vectors averaged, whose weights lie in its package.

Invariant: nothing is downloaded; the name says which weights made a vector, and vectors of other weights are never compared.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import wordllama

NAME = "wordllama l2_supercat 256"
WIDTH = 256
MOST_CHARACTERS = 4000
"""Of a text, its beginning: every text is padded to the longest beside it."""


@cache
def _model() -> wordllama.WordLlama:
    # The package looks for its tokenizer in a folder that it does not have; as a cache its own folder is read right.
    return wordllama.WordLlama.load("l2_supercat", dim=WIDTH, cache_dir=Path(wordllama.__file__).parent, disable_download=True)


def embed(texts: Sequence[str]) -> np.ndarray:
    """[n, WIDTH] float32, each of length 1: products of two are cosines.

    English mainly, word order unseen; a text without any known word is the zero vector.
    """
    return unit(np.asarray(_model().embed([text[:MOST_CHARACTERS] for text in texts], norm=False), np.float32))


def centred(vectors: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Less what they all share, and of length 1 again: on raw vectors of pictures any two look alike."""
    return unit(vectors - centre)


def unit(vectors: np.ndarray) -> np.ndarray:
    """[n, width], each of length 1; the zero vector stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
