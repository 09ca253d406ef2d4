"""Held-out figures of a run's final weights: whether the model sees, and whether it keeps its language.

Invariant: everything is measured on weights read back from disk, without augmentation, in an order fixed by the data; two runs over the
same weights give the same file.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.batch import IGNORE, PackedBatch, Segment, assemble
from data_pipeline.errors import UserError
from data_pipeline.read.images import Picture
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import BadSample, ImageElement, TextElement
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.templates import Rendered, render, whole
from data_pipeline.text.tokenizer import Tokenizer
from train.config import Config, Stage
from train.generate import greedy_captions
from train.held_out import HeldOut
from train.model.xcomposer2 import XComposer2
from train.run_dir import RunDir, write_json
from train.tracking.captions import Caption, data_uri
from train.weights.opened import of_run

BATCH_TOKENS = 2048
"""Tokens of a batch of segments that are only scored."""
GREEDY_BATCH = 64
GREEDY_TOKENS = 16
"""Tokens of a greedy caption; where it is compared, as many as the longest caption has, if those are more."""


@dataclass(frozen=True)
class Scores:
    """Summed negative log-likelihoods and token counts by segment."""

    nll: np.ndarray
    tokens: np.ndarray

    def mean(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.tokens.sum())

    def stderr(self, of: Sequence[str] | None = None) -> float:
        """Standard error of `mean` (a ratio of sums, by the delta method); `of` as that of `share_stderr`."""
        residuals = self.nll - self.mean() * self.tokens
        return float(np.sqrt((_by_concept(residuals, of) ** 2).sum()) / self.tokens.sum())


def evaluate_run(run_dir: Path) -> dict[str, Any]:
    """Measures a finished run and writes `evaluation.json`.

    Raises:
        UserError: the run is not finished, or held-out data is missing or not indexed.
    """
    run = RunDir(run_dir)
    opened = of_run(run.path)
    config = opened.config
    scorer = Scorer(opened.model, opened.tokenizer, config)
    results: dict[str, Any] = {
        "weights": opened.weights,
        "step": opened.step,
        "dtype": str(opened.dtype),
        "plora_b_norm": _plora_b_norm(opened.model),
        "splits": {name: scorer.split(name, Path(folder)) for name, folder in config.evaluate.splits.items()},
        "text": scorer.text(Path(config.evaluate.text)) if config.evaluate.text else None,
    }
    write_json(run.evaluation, results)
    for name, split in results["splits"].items():
        print(f"{config.run.name} {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in split.items() if isinstance(v, float)))
    return results


@dataclass(frozen=True)
class Question:
    """A caption that is to be scored behind the picture of a key, or behind none."""

    rendered: Rendered
    key: str | None


class Scorer:
    """A model and how its inputs are made."""

    def __init__(self, model: XComposer2, tokenizer: Tokenizer, config: Config) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.images = config.data.images

    def split(self, name: str, folder: Path) -> dict[str, Any]:
        """Figures of one held-out split with its `candidates.json`."""
        items, pixels = self._read_split(name, folder)
        captions = [item["caption"] for item in items]
        blind = self.score([self._segment(caption, None) for caption in captions])
        figures: dict[str, Any] = {"pictures": len(items), "nll_blind": blind.mean(), "stderr": {"nll_blind": blind.stderr(captions)}}
        if self.config.run.stage is Stage.language:
            return figures
        right = self.score([self._segment(item["caption"], pixels[item["key"]]) for item in items])
        wrong = self.score([self._segment(item["caption"], pixels[item["wrong_image"]]) for item in items])
        chosen = self._retrieve(items, pixels)
        hits = np.asarray([c == item["answer"] for c, item in zip(chosen, items, strict=True)])
        found, guessed = self._pictures_of_captions(items, pixels)
        longest = max(len(self.tokenizer.encode(caption)) for caption in captions)
        greedy = self._greedy([pixels[item["key"]] for item in items], max(GREEDY_TOKENS, longest + 1))
        exact = np.asarray([self._is(g, c) for g, c in zip(greedy, captions, strict=True)])
        # Differences by picture: their errors are far smaller than those of the losses, which differ by caption.
        sees = Scores(wrong.nll - right.nll, right.tokens)
        helps = Scores(blind.nll - right.nll, right.tokens)
        figures |= {
            "nll_right": right.mean(),
            "nll_wrong": wrong.mean(),
            "wrong_minus_right": sees.mean(),
            "blind_minus_right": helps.mean(),
            "retrieval_of_10": float(hits.mean()),
            "retrieval_by_guessing": float(np.mean([1 / len(item["candidates"]) for item in items])),
            "picture_of_10": float(found.mean()),
            "picture_by_guessing": guessed,
            "greedy_exact": float(exact.mean()),
        }
        figures["stderr"] |= {
            "nll_right": right.stderr(captions),
            "nll_wrong": wrong.stderr(captions),
            "wrong_minus_right": sees.stderr(captions),
            "blind_minus_right": helps.stderr(captions),
            "retrieval_of_10": share_stderr(hits, captions),
            "picture_of_10": share_stderr(found, captions),
            "greedy_exact": share_stderr(exact, captions),
        }
        by_hash = sorted(range(len(items)), key=lambda i: _by_hash(items[i]))
        figures["samples"] = [
            {
                "key": items[i]["key"],
                "reference": captions[i],
                "generated": greedy[i],
                "generated_right": bool(exact[i]),
                "retrieved": items[i]["candidates"][chosen[i]],
                "retrieved_right": bool(hits[i]),
                "image": data_uri(pixels[items[i]["key"]].whole()),
            }
            for i in by_hash[: self.config.evaluate.samples]
        ]
        return figures

    def text(self, folder: Path) -> dict[str, Any]:
        """Loss on text alone, and a digest of all its logits: equal digests mean equal models, as far as text goes."""
        scores, digest = self.read(self.texts(folder))
        return {"nll": scores.mean(), "stderr": scores.stderr(), "tokens": int(scores.tokens.sum()), "logits_sha256": digest}

    @torch.no_grad()
    def read(self, segments: Sequence[Segment]) -> tuple[Scores, str]:
        """As `score`, and SHA-256 of the logits before every supervised token, of one pass."""
        digest, parts = hashlib.sha256(), []
        for batch, count in self._batches(segments):
            logits_LV = self.model.logits(batch)
            digest.update(logits_LV[: batch.supervised].cpu().numpy())
            per_target_L = F.cross_entropy(logits_LV, batch.targets, reduction="none", ignore_index=IGNORE)
            parts.append(_by_segment(batch, count, per_target_L))
        return _joined(parts), digest.hexdigest()

    def texts(self, folder: Path) -> list[Segment]:
        """The segments of a held-out plain-text source."""
        source = self._open("text", folder)
        reader = Materialiser([source], self.tokenizer, self.images, 0)
        segments = []
        for row in map(int, source.kept(0, source.facts.kept)):
            try:
                elements = reader.elements(0, row)
            except BadSample as bad:
                raise UserError(f"{folder.absolute()}: {source.key(row)} cannot be read: {bad} (rebuild it)") from None
            segments.append(Segment(render(elements, whole(elements), self.tokenizer, self.images.tokens), (), 0, row))
        return segments

    def captions(self, name: str, folder: Path, most: int) -> dict[str, list[Segment]]:
        """Captions of at most so many pictures of a split: behind none, the right one and a wrong one; in stage language only none."""
        split = self.open(name, folder)
        return {figure: self.shown(split, asked) for figure, asked in self.questions(split, most).items()}

    def questions(self, split: HeldOut, most: int) -> dict[str, list[Question]]:
        """What `captions` scores, with no picture decoded."""
        items = split.items[:: max(1, -(-len(split.items) // most))]  # evenly: neighbours are alike
        found = {"blind": [Question(self._rendered(item["caption"], None), None) for item in items]}
        if self.config.run.stage is not Stage.language:
            tokens = split.tokens()
            for figure, key in (("right", "key"), ("wrong", "wrong_image")):
                found[figure] = [Question(self._rendered(item["caption"], tokens[item[key]]), item[key]) for item in items]
        return found

    def shown(self, split: HeldOut, questions: Sequence[Question]) -> list[Segment]:
        """The questions with their pictures, which are decoded now."""
        pictures = [None if asked.key is None else split.picture(asked.key) for asked in questions]
        return [_behind(asked.rendered, picture) for asked, picture in zip(questions, pictures, strict=True)]

    def pictures(self, name: str, folder: Path, most: int) -> list[tuple[dict[str, Any], Picture]]:
        """The first pictures of a split by hash, with their items of `candidates.json`."""
        split = self.open(name, folder)
        return [(item, split.picture(item["key"])) for item in sorted(split.items, key=_by_hash)[:most]]

    def write(self, name: str, pictures: Sequence[tuple[dict[str, Any], Picture]]) -> list[Caption]:
        """The greedy captions of some pictures; a fixed number of steps, so that ranks stay together."""
        written = self._greedy([picture for _, picture in pictures], GREEDY_TOKENS)
        return [
            Caption(name, item["key"], item["caption"], words, picture.whole())
            for (item, picture), words in zip(pictures, written, strict=True)
        ]

    @torch.no_grad()
    def score(self, segments: Sequence[Segment]) -> Scores:
        """Negative log-likelihood of the supervised tokens of each segment; those of one picture are best neighbours."""
        return _joined([_by_segment(batch, count, self.model(batch).per_target_L) for batch, count in self._batches(segments)])

    def _batches(self, segments: Sequence[Segment]) -> Iterator[tuple[PackedBatch, int]]:
        """Segments in their order, cut into batches, one at a time in memory; and how many each holds."""
        groups: list[list[Segment]] = [[]]
        tokens = 0
        for segment in segments:
            tokens += len(segment.rendered.ids)
            if groups[-1] and tokens > BATCH_TOKENS:
                groups.append([])
                tokens = len(segment.rendered.ids)
            groups[-1].append(segment)
        device = self.model.head.weight.device
        end = self.tokenizer.end
        for group in groups:
            yield (
                _pictures_once(assemble(group, self.images.size, self.images.tokens, end), group, self.images.tokens).to(device),
                len(group),
            )

    def _segment(self, caption: str, picture: Picture | None) -> Segment:
        """A caption behind its picture, or alone."""
        return _behind(self._rendered(caption, None if picture is None else picture.tokens), picture)

    def _rendered(self, caption: str, tokens: int | None) -> Rendered:
        """A caption behind a picture of so many tokens, or alone."""
        elements = [TextElement(caption)] if tokens is None else [ImageElement(b""), TextElement(caption)]
        return render(elements, whole(elements), self.tokenizer, tokens or 0)

    def _retrieve(self, items: list[dict[str, Any]], pixels: dict[str, Picture]) -> list[int]:
        """The candidate caption with the greatest summed likelihood, for each picture."""
        segments = [self._segment(caption, pixels[item["key"]]) for item in items for caption in item["candidates"]]
        nll = self.score(segments).nll
        borders = np.cumsum([len(item["candidates"]) for item in items])[:-1]
        return [int(part.argmin()) for part in np.split(nll, borders)]

    def _pictures_of_captions(self, items: list[dict[str, Any]], pixels: dict[str, Picture]) -> tuple[np.ndarray, float]:
        """For each item, whether its caption is likeliest behind its own picture; and the share that guessing would find.

        The pictures are those of the item's candidate captions, of each the first that has it.
        """
        first = {item["caption"]: item["key"] for item in reversed(items)}
        shown = [[(c == i["caption"], i["key"] if c == i["caption"] else first[c]) for c in i["candidates"] if c in first] for i in items]
        asked = [(key, item["caption"]) for item, options in zip(items, shown, strict=True) for _, key in options]
        order = sorted(range(len(asked)), key=lambda i: asked[i])
        nll = np.empty(len(asked))
        nll[order] = self.score([self._segment(caption, pixels[key]) for key, caption in (asked[i] for i in order)]).nll
        counts = np.asarray([len(options) for options in shown])
        parts = np.split(nll, np.cumsum(counts)[:-1])
        return np.asarray([options[part.argmin()][0] for part, options in zip(parts, shown, strict=True)]), float((1 / counts).mean())

    def _greedy(self, pixels: list[Picture], most: int) -> list[str]:
        captions = []
        for first in range(0, len(pixels), GREEDY_BATCH):
            part = pixels[first : first + GREEDY_BATCH]
            captions += greedy_captions(self.model, part, self.tokenizer, most)
        return captions

    def _is(self, written: str, caption: str) -> bool:
        """Whether what was written is the caption as the tokenizer would write it. The newline that ends a turn is no part of it."""
        return written.strip() == self.tokenizer.decode(self.tokenizer.encode(caption)).strip()

    def _read_split(self, name: str, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Picture]]:
        split = self.open(name, folder)
        return split.items, split.pictures()

    def open(self, name: str, folder: Path) -> HeldOut:
        """A held-out split.

        Raises:
            UserError: it is missing, not indexed, or not laid out as a split.
        """
        return HeldOut(self._open(name, folder), self.tokenizer, self.images)

    def _open(self, name: str, folder: Path) -> ShardSource:
        source = ShardSource(name, folder, key=evaluate_key(name))
        source.require_tokenizer(self.tokenizer.digest)
        return source


def _by_segment(batch: PackedBatch, count: int, per_target_L: Tensor) -> Scores:
    """The scores of a batch of so many segments."""
    sums = per_target_L.new_zeros(count + 1, dtype=torch.float64)
    sums.index_add_(0, batch.target_segment, per_target_L.double())
    tokens = np.bincount(batch.target_segment[: batch.supervised].cpu().numpy(), minlength=count)
    return Scores(sums[:count].cpu().numpy(), tokens)


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(np.concatenate([part.nll for part in parts]), np.concatenate([part.tokens for part in parts]))


def _behind(rendered: Rendered, picture: Picture | None) -> Segment:
    return Segment(rendered, (), 0, 0) if picture is None else Segment(rendered, picture.tiles, 0, 0, picture.grids)


def _pictures_once(batch: PackedBatch, segments: Sequence[Segment], tile_tokens: int) -> PackedBatch:
    """The same batch with each of its pictures once, as the ViT needs them: ten captions of a picture are scored together.

    For squares that hold a picture each; other batches are returned as they are.
    """
    tiles = [id(tile) for segment in segments for tile in segment.pixels]
    if any(segment.grids for segment in segments) or len(set(tiles)) == len(tiles):
        return batch
    place = {tile: number for number, tile in enumerate(dict.fromkeys(tiles))}
    first = [tiles.index(tile) for tile in place]
    rows = torch.tensor([place[tile] for tile in tiles])[:, None] * tile_tokens + torch.arange(tile_tokens)
    return replace(batch, images=batch.images[first], image_rows=rows.flatten())


def evaluate_key(name: str) -> str:
    """The key of a config that names a held-out source."""
    return "evaluate.text" if name == "text" else f"evaluate.splits.{name}"


def _by_hash(item: dict[str, Any]) -> bytes:
    """Neighbours by key are pictures of one subgroup; a hash shows a cross-section that nobody chose."""
    return hashlib.sha256(item["key"].encode()).digest()


def share_stderr(hits: np.ndarray, of: Sequence[str] | None = None) -> float:
    """Standard error of a share of hits.

    `of`: the concept of each; pictures of one concept hit and miss together, so that their errors are added before they are squared.
    """
    return float(np.sqrt((_by_concept(hits - hits.mean(), of) ** 2).sum())) / len(hits)


def _by_concept(residuals: np.ndarray, of: Sequence[str] | None) -> np.ndarray:
    if of is None:
        return residuals
    return np.bincount(np.unique(of, return_inverse=True)[1], weights=residuals)


def _plora_b_norm(model: XComposer2) -> float:
    """Norm of all low-rank output weights: 0 means that PLoRA has learnt nothing."""
    squares = [float(p.detach().float().square().sum()) for n, p in model.named_parameters() if n.endswith("plora_b")]
    return math.sqrt(sum(squares))
