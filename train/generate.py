"""Decoding with a cache of keys and values: prompts with pictures in, words out, many prompts at once.

Invariant: the logits are those of running each whole text anew, up to rounding, so greedy words are the same; what a prompt is answered
depends on no other prompt of its batch. Ranks that must stay in step ask for a fixed number of steps.

Under dynamic RoPE scaling a text's angles are from its beginning those of the length that it may grow to: keys in a cache cannot turn.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.read.images import Picture
from data_pipeline.text.templates import Rendered
from data_pipeline.text.tokenizer import Tokenizer
from train.model.attention import Segments, longest_plain, varlen_attention
from train.model.xcomposer2 import XComposer2


@dataclass(frozen=True)
class Sampling:
    """How the next word is drawn from the logits."""

    temperature: float = 0.0
    """0 takes the likeliest; above, logits are divided by it before one is drawn."""
    top_p: float = 1.0
    """Only the likeliest words that together reach this share are drawn from; the likeliest one is always among them."""
    seed: int = 0
    """The n-th prompt of a call draws with seed + n."""


GREEDY = Sampling()


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt."""

    ids: list[int]
    """Without the token that ended it."""
    stopped: bool
    """The model ended it; otherwise the limit did."""


class KeyValueCache:
    """Keys and values of all layers for a batch of B texts, called by the layers in turn; see `Segments.cache`.

    A text's rows lie from 0 on, whatever the lengths of the others; rows behind its end are masked.
    """

    def __init__(self, lengths: Sequence[int], more: int) -> None:
        """Texts of these lengths, each to be given up to `more` tokens."""
        self.lengths, self.room = list(lengths), max(lengths) + more
        self._grown = tuple(length + more for length in lengths)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._layer = 0
        """Which layer calls next: they call in order."""
        self._backend = ""
        """What attends inside the prompts."""
        self._positions_B = self._bias = torch.empty(0)

    @torch.no_grad()
    def prefill(self, model: XComposer2, batch: PackedBatch) -> Tensor:
        """Runs the prompts, which are the segments of `batch`; returns the logits [B, vocab] after each."""
        x_TD = model.embed(batch)
        grown = (*self._grown, batch.segment_lengths[-1])
        segments = Segments.build(batch.segment_lengths, batch.cu_seqlens, x_TD.dtype, model.attention)
        segments, self._backend = replace(segments, cache=self._keep, grown=grown), segments.backend
        hidden_TD = model.decoder(x_TD, batch.position_ids, segments, batch.image_index)
        ends_B = batch.cu_seqlens[1 : 1 + len(self.lengths)].long() - 1
        return model.head(hidden_TD, ends_B)

    @torch.no_grad()
    def step(self, model: XComposer2, ids_B: Tensor) -> Tensor:
        """Appends one token to every text; returns the logits [B, vocab] after it."""
        B, device = len(ids_B), ids_B.device
        positions_B = torch.tensor(self.lengths, device=device)
        self.lengths = [n + 1 for n in self.lengths]
        seen = torch.arange(max(self.lengths), device=device) <= positions_B[:, None]
        self._layer, self._positions_B = 0, positions_B
        x_BD = model.decoder.tok_embeddings(ids_B)
        self._bias = torch.where(seen, 0.0, float("-inf")).to(x_BD.dtype)[:, None, None, :]
        borders = torch.arange(B + 1, dtype=torch.int32, device=device)
        segments = Segments("cache", borders, 1, (1,) * B, cache=self._extend, grown=self._grown)
        no_image = torch.zeros(0, dtype=torch.int64, device=device)
        hidden_BD = model.decoder(x_BD, positions_B, segments, no_image)
        return model.head(hidden_BD, torch.arange(B, device=device))

    def _keep(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments) -> Tensor:
        """A layer's keys and values of the prompts."""
        B, (_, K, H) = len(self.lengths), k_TKH.shape
        for kept, x_TKH in ((self._keys, k_TKH), (self._values, v_TKH)):
            cached_BKLH = x_TKH.new_zeros(B, K, self.room, H)
            for text, rows in enumerate(x_TKH[: sum(self.lengths)].split(self.lengths)):
                cached_BKLH[text, :, : len(rows)] = rows.transpose(0, 1)
            kept.append(cached_BKLH)
        return varlen_attention(q_TNH, k_TKH, v_TKH, replace(segments, cache=None))

    def _extend(self, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor, segments: Segments) -> Tensor:
        """A layer's attention of one new token a text to all that stands before it."""
        (B, N, H), K, L = q_BNH.shape, k_BKH.shape[1], max(self.lengths)
        layer, self._layer = self._layer, self._layer + 1
        texts_B = torch.arange(B, device=q_BNH.device)
        self._keys[layer][texts_B, :, self._positions_B] = k_BKH
        self._values[layer][texts_B, :, self._positions_B] = v_BKH
        q_BKGH = q_BNH.view(B, K, N // K, H)  # the query heads that share a key head, as rows
        out_BKGH = self._attend(q_BKGH, self._keys[layer][:, :, :L], self._values[layer][:, :, :L])
        return out_BKGH.reshape(B, N, H)

    def _attend(self, q_BKGH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor) -> Tensor:
        """With the scores of each text rounded as they are where it is run anew: in half precision that decides between close words."""
        limit = longest_plain(q_BKGH.dtype) if self._backend == "sdpa" else 0
        plain = [length <= limit for length in self.lengths]
        by_kernel = None if all(plain) else F.scaled_dot_product_attention(q_BKGH, k_BKLH, v_BKLH, attn_mask=self._bias)
        if not any(plain):
            return by_kernel
        weights = (q_BKGH @ k_BKLH.transpose(2, 3) * q_BKGH.shape[-1] ** -0.5 + self._bias).softmax(-1)
        by_hand = weights @ v_BKLH
        if by_kernel is None:
            return by_hand
        return torch.where(torch.tensor(plain, device=q_BKGH.device)[:, None, None, None], by_hand, by_kernel)


def next_logits(model: XComposer2, prompts: Sequence[Segment], tokenizer: Tokenizer) -> Tensor:
    """Logits [B, vocab] fp32 of the token that follows each prompt."""
    return _cache(prompts, 0).prefill(model, _batch(model, prompts, tokenizer))


def generate(
    model: XComposer2,
    prompts: Sequence[Segment],
    tokenizer: Tokenizer,
    max_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
    fixed_steps: bool = False,
    hear: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """What the model writes after each prompt.

    Args:
        model: in evaluation mode.
        prompts: each begins with the begin token; what is supervised in them does not matter.
        tokenizer: its end token always stops.
        max_tokens: the longest answer.
        stop: further tokens that end an answer.
        sampling: greedy by default.
        fixed_steps: run all `max_tokens` steps even if every answer has ended: what ranks under ZeRO-3 need.
        hear: told the number of a prompt and a token as soon as that is written after it.
    """
    stops = {tokenizer.end, *stop}
    draws = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    cache = _cache(prompts, max_tokens)
    logits = cache.prefill(model, _batch(model, prompts, tokenizer))
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for number in range(max_tokens):
        words = [_draw(row, sampling, draw) for row, draw in zip(logits, draws, strict=True)] if sampling.temperature else _argmax(logits)
        for i, word in enumerate(words):
            ended[i] |= word in stops
            if not ended[i]:
                written[i].append(word)
                if hear is not None:
                    hear(i, word)
        if number + 1 < max_tokens and (fixed_steps or not all(ended)):
            logits = cache.step(model, torch.tensor(words, device=logits.device))
        elif all(ended):
            break
    return [Answer(ids, end) for ids, end in zip(written, ended, strict=True)]


def greedy_captions(model: XComposer2, pictures: Sequence[Picture], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """The likeliest words after each picture and nothing else. A fixed number of steps."""
    prompts = [_after(picture, tokenizer) for picture in pictures]
    return [tokenizer.decode(a.ids) for a in generate(model, prompts, tokenizer, max_tokens, fixed_steps=True)]


def _after(picture: Picture, tokenizer: Tokenizer) -> Segment:
    ids = np.asarray([tokenizer.begin, *[tokenizer.end] * picture.tokens], np.int64)
    rendered = Rendered(ids, np.zeros(len(ids), bool), np.arange(1, 1 + picture.tokens), (0,))
    return Segment(rendered, picture.tiles, 0, 0, picture.grids)


def _cache(prompts: Sequence[Segment], max_tokens: int) -> KeyValueCache:
    return KeyValueCache([len(p.rendered.ids) for p in prompts], max_tokens)


def _batch(model: XComposer2, prompts: Sequence[Segment], tokenizer: Tokenizer) -> PackedBatch:
    return assemble(prompts, model.vision.vit.patch_embed.img_size[0], model.projector.tokens, tokenizer.end).to(model.head.weight.device)


def _argmax(logits: Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


def _draw(logits: Tensor, sampling: Sampling, draw: torch.Generator) -> int:
    """On the CPU, so that a seed means the same on every device."""
    shares, words = (logits.cpu() / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    kept = shares.cumsum(-1) - shares < sampling.top_p
    kept[0] = True
    return int(words[torch.multinomial(shares * kept, 1, generator=draw)])
