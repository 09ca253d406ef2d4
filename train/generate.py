"""Greedy decoding of captions, many pictures at once.

Invariant: every picture runs the same fixed number of steps, so that ranks stay in step; what follows the end token is cut afterwards.
The whole text so far is run again for each token: captions are short, and there is no cache to get wrong.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.batch import Segment, assemble
from data_pipeline.text.templates import Rendered
from data_pipeline.text.tokenizer import Tokenizer
from train.model.xcomposer2 import XComposer2


@torch.no_grad()
def greedy_captions(model: XComposer2, pixels: Sequence[np.ndarray], tokenizer: Tokenizer, image_tokens: int, max_tokens: int) -> list[str]:
    """The likeliest next word, again and again; `pixels` are [3, H, W] uint8."""
    device = model.head.weight.device
    prompts = [[tokenizer.begin, *[tokenizer.end] * image_tokens] for _ in pixels]
    written: list[list[int]] = [[] for _ in pixels]
    for _ in range(max_tokens):
        segments = [_segment(p + w, image, tokenizer.end, image_tokens) for p, w, image in zip(prompts, written, pixels, strict=True)]
        batch = assemble(segments, pixels[0].shape[-1], image_tokens, tokenizer.end).to(device)
        best = model.logits(batch)[: len(pixels)].argmax(-1)
        for words, word in zip(written, best.tolist(), strict=True):
            words.append(word)
    return [tokenizer.decode(words[: words.index(tokenizer.end)] if tokenizer.end in words else words) for words in written]


def _segment(ids: list[int], image: np.ndarray, pad: int, image_tokens: int) -> Segment:
    """One more token, any, so that the last written one becomes a target position."""
    supervised = np.zeros(len(ids) + 1, bool)
    supervised[-1] = True
    rendered = Rendered(np.asarray([*ids, pad], np.int64), supervised, np.arange(1, 1 + image_tokens), (0,))
    return Segment(rendered, (image,), 0, 0)
