"""The place of a batch between a worker and the trainer holds every batch that can be."""

import numpy as np
import pytest
from demo_data import data_config, run, same_batch, same_step

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.config import ImageConfig, SourceConfig
from data_pipeline.read.slots import Slots
from data_pipeline.text.templates import Rendered

SIZE = 14


def batch_of(tokens: int, length: int, image_tokens: int) -> PackedBatch:
    """So many tokens in segments of one length: words with a target each, or where a segment is an image's size an image each."""
    image = length == image_tokens
    rendered = Rendered(
        np.ones(length, np.int64),
        np.arange(length) > 0 if not image else np.zeros(length, bool),
        np.arange(length) if image else np.zeros(0, np.int64),
        (0,) if image else (),
    )
    pixels = (np.zeros((3, SIZE, SIZE), np.uint8),) if image else ()
    return assemble([Segment(rendered, pixels, 0, i) for i in range(tokens // length)], SIZE, image_tokens, 2)


@pytest.mark.parametrize("tokens", [16, 256, 4096])
@pytest.mark.parametrize("image_tokens", [1, 4, 1225])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_a_slot_holds_the_batch_with_the_most_words(tokens, image_tokens, length):
    batch = batch_of(tokens, length, image_tokens)
    slots = Slots(1, 1, len(batch.images), SIZE, tokens, image_tokens)
    number, _ = slots.next(0)
    taken = slots.take(slots.lay(0, number, batch), pin=False)
    taken.images.copy_(batch.images)  # which no worker decoded here
    assert same_batch(taken, batch)


def test_words_alone_pass_a_worker_though_an_image_is_longer_than_the_context(demo):
    """Every batch carries one dummy image, of 1,225 tokens by default."""
    sources = {"text": SourceConfig(str(demo.source("text")))}
    config = {"sources": sources, "context": 256, "global_batch": 1, "images": ImageConfig(size=32, tokens=1225)}
    alone, worker = (run(data_config(demo.root, workers=workers, **config)) for workers in (0, 1))
    for _ in range(3):
        assert same_step(next(alone), next(worker))
