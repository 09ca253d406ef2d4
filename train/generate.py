"""Greedy decoding of captions, many pictures at once.

Invariant: every picture runs the same fixed number of steps, so that ranks stay in step; what follows the end token is cut afterwards.
The whole text so far is run again for each token: captions are short, and there is no cache to get wrong.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.batch import Segment, assemble
from data_pipeline.read.images import Picture
from data_pipeline.text.templates import Rendered
from data_pipeline.text.tokenizer import Tokenizer
from train.model.xcomposer2 import XComposer2


@torch.no_grad()
def greedy_captions(model: XComposer2, pictures: Sequence[Picture], tokenizer: Tokenizer, image_tokens: int, max_tokens: int) -> list[str]:
    """The likeliest next word, again and again; `image_tokens` are those of one tile."""
    device = model.head.weight.device
    prompts = [[tokenizer.begin, *[tokenizer.end] * picture.tokens] for picture in pictures]
    written: list[list[int]] = [[] for _ in pictures]
    for _ in range(max_tokens):
        segments = [_segment(p + w, picture, tokenizer.end) for p, w, picture in zip(prompts, written, pictures, strict=True)]
        batch = assemble(segments, pictures[0].tiles[0].shape[-1], image_tokens, tokenizer.end).to(device)
        best = model.logits(batch)[: len(pictures)].argmax(-1)
        for words, word in zip(written, best.tolist(), strict=True):
            words.append(word)
    return [tokenizer.decode(words[: words.index(tokenizer.end)] if tokenizer.end in words else words) for words in written]


def _segment(ids: list[int], picture: Picture, pad: int) -> Segment:
    """One more token, any, so that the last written one becomes a target position."""
    supervised = np.zeros(len(ids) + 1, bool)
    supervised[-1] = True
    rendered = Rendered(np.asarray([*ids, pad], np.int64), supervised, np.arange(1, 1 + picture.tokens), (0,))
    return Segment(rendered, picture.tiles, 0, 0, picture.grids)
