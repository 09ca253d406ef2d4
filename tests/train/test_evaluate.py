"""Held-out figures mean what they say, and decoding is what the model's own logits prefer."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stages import stage_settings

from data_pipeline.batch import assemble
from data_pipeline.config import ImageRule
from data_pipeline.errors import UserError
from data_pipeline.read import images
from data_pipeline.read.images import Picture
from data_pipeline.text.tokenizer import Tokenizer
from train import configure
from train.config import Config
from train.evaluate import Scorer, Scores, share_stderr
from train.generate import greedy_captions
from train.held_out import HeldOut
from train.model.xcomposer2 import XComposer2
from train.ranks import Ranks
from train.run_dir import RunDir
from train.validate import Validation


@pytest.fixture(scope="module")
def scorer(demo, tmp_path_factory) -> Scorer:
    import yaml

    folder = tmp_path_factory.mktemp("scorer")
    (folder / "config.yaml").write_text(yaml.safe_dump(stage_settings(demo, folder / "run")))
    config: Config = configure.load(folder / "config.yaml")
    config.model.decoder.init_std = 0.3  # decided opinions, so that an argmax is not a coin toss
    model = XComposer2(config.model, config.data.images.size, config.data.images.tokens)
    model.init_weights(1)
    return Scorer(model.eval(), Tokenizer(config.data.tokenizer), config)


def picture(seed: int) -> Picture:
    return Picture((np.random.default_rng(seed).integers(0, 256, (3, 32, 32), np.uint8),), None, tokens=1)


def test_a_segment_scores_the_same_alone_and_among_others(scorer):
    captions = ["food fruit: red apple", "animal bird: parrot", "sky weather: sun behind cloud"]
    segments = [scorer._segment(caption, picture(i)) for i, caption in enumerate(captions)]
    together = scorer.score(segments)
    alone = [scorer.score([s]) for s in segments]
    assert together.nll == pytest.approx([s.nll[0] for s in alone], rel=1e-5)
    assert together.tokens.tolist() == [len(scorer.tokenizer.encode(c)) + 1 for c in captions]


def test_captions_of_one_picture_score_as_alone_and_the_vit_sees_it_once(scorer):
    captions = ["red apple", "parrot", "sun behind cloud"]
    shown = [picture(0), picture(1)]
    segments = [scorer._segment(caption, of) for of in (*shown, shown[0]) for caption in captions]
    alone = [scorer.score([s]).nll[0] for s in segments]
    seen: list[int] = []
    hook = scorer.model.vision.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        together = scorer.score(segments)
    finally:
        hook.remove()
    assert together.nll == pytest.approx(alone, rel=1e-5)
    assert seen == [2]


def test_a_score_is_the_cross_entropy_of_the_caption_and_its_end(scorer):
    segment = scorer._segment("food fruit: red apple", picture(3))
    batch = assemble([segment], 32, 1, scorer.tokenizer.end)
    with torch.no_grad():
        logits = scorer.model.logits(batch)[: batch.supervised]
    expected = F.cross_entropy(logits, batch.targets[: batch.supervised], reduction="sum").item()
    assert scorer.score([segment]).nll[0] == pytest.approx(expected, rel=1e-5)


def test_reading_scores_as_scoring_does_and_digests_the_logits_in_the_same_pass(scorer):
    segments = [scorer._segment(caption, None) for caption in ("red apple " * 700, "parrot " * 900, "sun behind cloud")]
    passes = []
    hook = scorer.model.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        scores, digest = scorer.read(segments)
    finally:
        hook.remove()
    logits = hashlib.sha256()
    with torch.no_grad():
        batches = [scorer.model.logits(batch)[: batch.supervised] for batch, _ in scorer._batches(segments)]
    for part in batches:
        logits.update(part.numpy().tobytes())
    assert digest == logits.hexdigest() and len(passes) == len(batches) == 2
    asked = scorer.score(segments)
    assert scores.nll == pytest.approx(asked.nll, rel=1e-5) and scores.tokens.tolist() == asked.tokens.tolist()


def test_greedy_captions_are_what_the_logits_prefer_word_by_word_and_do_not_depend_on_the_neighbours(scorer):
    images = [picture(i) for i in range(3)]
    captions = greedy_captions(scorer.model, images, scorer.tokenizer, 5)
    assert captions == [greedy_captions(scorer.model, [image], scorer.tokenizer, 5)[0] for image in images]
    first_word = captions[0].split()[0]
    batch = assemble([scorer._segment(first_word, images[0])], 32, 1, scorer.tokenizer.end)
    with torch.no_grad():
        assert scorer.tokenizer.decode([int(scorer.model.logits(batch)[0].argmax())]) == first_word


def test_a_caption_that_ends_as_a_turn_does_is_as_right_as_one_that_ends_alone(scorer):
    assert scorer._is("red apple", "red apple") and scorer._is("red apple\n", "red apple")
    assert not scorer._is("red apple red", "red apple") and not scorer._is("apple", "red apple")


def test_the_standard_error_is_that_of_resampled_pictures():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 12, 400)
    nll = rng.gamma(2.0, 1.0, 400) * tokens
    scores = Scores(nll, tokens)
    draws = rng.integers(0, 400, (4000, 400))
    bootstrap = (nll[draws].sum(1) / tokens[draws].sum(1)).std()
    assert scores.stderr() == pytest.approx(bootstrap, rel=0.05)


def test_pictures_of_one_concept_count_together_in_a_standard_error():
    rng = np.random.default_rng(0)
    concept = np.sort(rng.integers(0, 130, 400))
    tokens = 3 + concept % 7
    nll = (rng.gamma(2.0, 1.0, 130)[concept] + rng.gamma(2.0, 0.2, 400)) * tokens
    hits = rng.random(130)[concept] + 0.1 * rng.standard_normal(400) > 0.5
    of, members = [str(c) for c in concept], [np.flatnonzero(concept == c) for c in np.unique(concept)]
    draws = [np.concatenate([members[c] for c in rng.integers(0, len(members), len(members))]) for _ in range(4000)]
    assert Scores(nll, tokens).stderr(of) == pytest.approx(np.std([nll[d].sum() / tokens[d].sum() for d in draws]), rel=0.05)
    assert share_stderr(hits, of) == pytest.approx(np.std([hits[d].mean() for d in draws]), rel=0.05)
    assert share_stderr(hits, of) > 1.4 * share_stderr(hits), "as if each told something of its own"


def test_on_the_way_each_rank_decodes_the_pictures_that_it_scores_and_no_others(scorer, demo, tmp_path, monkeypatch):
    folder, world = demo.source("heldout/unseen_picture/test"), 3
    items = json.loads((folder / "candidates.json").read_text())["items"][::10]
    assert len(items) == 20
    config = replace(scorer.config, evaluate=replace(scorer.config.evaluate, splits={"x": str(folder)}, pictures=20))
    expected = {figure: scorer.score(segments) for figure, segments in scorer.captions("x", folder, 20).items()}
    decoded, decode = [], images.load_square
    monkeypatch.setattr(images, "load_square", lambda *arguments: decoded.append(1) or decode(*arguments))
    found = []
    for rank in range(world):
        engine, ranks = SimpleNamespace(module=scorer.model), Ranks(rank, world, None)
        found.append(Validation(config, RunDir(tmp_path), scorer.tokenizer, engine, ranks, None)._read())
        own = items[rank * 7 : rank * 7 + 7]
        assert len(decoded) == len({key for item in own for key in (item["key"], item["wrong_image"])})
        decoded.clear()
    for figure, scores in expected.items():
        batches = [part[f"x/nll_{figure}"] for part in found]
        assert len({len(of_rank) for of_rank in batches}) == 1, "ranks stay together"
        with torch.no_grad():
            total = sum(scorer.model(batch).loss_sum.item() for of_rank in batches for batch in of_rank)
        assert total == pytest.approx(scores.nll.sum(), rel=1e-5)
    assert len(scorer.pictures("x", folder, 3)) == len(decoded) == 3


def test_how_many_tokens_a_picture_takes_is_known_before_it_is_decoded(scorer, demo):
    policy = replace(scorer.images, policy=ImageRule.partition, most_tiles=4)
    split = HeldOut(scorer._open("x", demo.source("heldout/unseen_picture/test")), scorer.tokenizer, policy)
    known = split.tokens()
    assert known == {key: picture.tokens for key, picture in split.pictures().items()}
    assert min(known.values()) > scorer.images.tokens, "a global view and tiles"


def test_the_figures_of_a_split_are_those_of_its_pictures_asked_one_by_one(scorer, demo, tmp_path):
    folder = demo.copy("heldout/unseen_picture/test", tmp_path / "split")
    items = json.loads((folder / "candidates.json").read_text())["items"][:12]
    (folder / "candidates.json").write_text(json.dumps({"items": items}))
    pictures = HeldOut(scorer._open("x", folder), scorer.tokenizer, scorer.images).pictures()

    def scores(key: str | None, *captions: str) -> list[tuple[float, int]]:
        asked = [scorer.score([scorer._segment(caption, pictures.get(key))]) for caption in captions]
        return [(float(s.nll[0]), int(s.tokens[0])) for s in asked]

    def mean(key: str | None) -> float:
        found = [scores(item.get(key), item["caption"])[0] for item in items]
        return sum(nll for nll, _ in found) / sum(tokens for _, tokens in found)

    found = scorer.split("x", folder)
    assert found["pictures"] == 12
    assert (found["nll_right"], found["nll_wrong"], found["nll_blind"]) == pytest.approx([mean("key"), mean("wrong_image"), mean(None)])
    likeliest = [item["candidates"][int(np.argmin([nll for nll, _ in scores(item["key"], *item["candidates"])]))] for item in items]
    assert found["retrieval_of_10"] == np.mean([words == item["caption"] for words, item in zip(likeliest, items, strict=True)])
    (folder / "candidates.json").write_text(
        json.dumps({"items": [{**i, "answer": i["candidates"].index(w), "caption": w} for i, w in zip(items, likeliest, strict=True)]})
    )
    assert scorer.split("x", folder)["retrieval_of_10"] == 1.0, "where what the model prefers is right"


def test_held_out_data_of_another_tokenizer_or_without_its_pictures_is_refused(scorer, demo, tmp_path):
    folder = demo.copy("heldout/unseen_picture/test", tmp_path / "split")
    item = {"key": "gone", "wrong_image": "gone", "caption": "a", "candidates": ["a"], "answer": 0}
    (folder / "candidates.json").write_text(json.dumps({"items": [item]}))
    with pytest.raises(UserError, match="names gone"):
        scorer.split("x", folder)
