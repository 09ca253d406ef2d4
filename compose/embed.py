"""Sentence embeddings for retrieval: WordLlama, word vectors averaged over a sentence, whose weights lie in its package.

Invariant: nothing is downloaded; the name says which weights made a vector, and vectors of other weights are never compared.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import wordllama

NAME = "wordllama l2_supercat 256"
WIDTH = 256


@cache
def _model() -> wordllama.WordLlama:
    # The package looks for its tokenizer in a folder that it does not have; as a cache its own folder is read right.
    return wordllama.WordLlama.load("l2_supercat", dim=WIDTH, cache_dir=Path(wordllama.__file__).parent, disable_download=True)


def embed(texts: Sequence[str]) -> np.ndarray:
    """[n, WIDTH] float32, each of length 1: products of two are cosines.

    English mainly, word order unseen; a text without any known word is the zero vector.
    """
    vectors = np.asarray(_model().embed(list(texts), norm=False), np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
