"""The model under 4KHD's partition: projector and placement against a reference, and no batch that is special."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import IMAGE_SIZE, IMAGE_TOKENS, VOCAB, tiny_config
from no_host_sync import no_host_sync
from torch import Tensor

from data_pipeline.batch import PackedBatch, Segment, assemble
from data_pipeline.plan.partition import token_count
from data_pipeline.text.templates import Rendered
from train.model.projector import Projector
from train.model.xcomposer2 import XComposer2

GRIDS = [(1, 1), (2, 3), (3, 1)]


def model_of() -> XComposer2:
    config = tiny_config()
    config.projector.marks = True
    model = XComposer2(config, IMAGE_SIZE, IMAGE_TOKENS)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if name.endswith("plora_b"):
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return model


def segment(number: int, grids: Sequence[tuple[int, int]]) -> Segment:
    """Images of these grids, then words."""
    rng = np.random.default_rng(number)
    images = sum(int(token_count(*grid, IMAGE_TOKENS)) for grid in grids)
    tiles = tuple(rng.integers(0, 256, (sum(r * c + 1 for r, c in grids), 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8))
    ids = np.concatenate([[1], np.full(images, 1), rng.integers(2, VOCAB, 7)])
    supervised = np.arange(len(ids)) > images
    return Segment(Rendered(ids, supervised, np.arange(1, 1 + images), tuple(range(len(grids)))), tiles, 0, number, tuple(grids))


def batch_of(*grids: Sequence[tuple[int, int]]) -> PackedBatch:
    """A segment for each list of grids."""
    return assemble([segment(number, of_segment) for number, of_segment in enumerate(grids)], IMAGE_SIZE, IMAGE_TOKENS, 1)


def reference(projector: Projector, features_MPD: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Image by image, as one reads it: merge, put the tiles together, end each row, then project all of it."""
    tokens, m = [], projector.merge
    for rows, columns in grids:
        found = []
        for (r, c), part in (((1, 1), features_MPD[:1]), ((rows, columns), features_MPD[1 : 1 + rows * columns])):
            side = math.isqrt(part.shape[1])
            picture = torch.cat([torch.cat([t.view(side, side, -1) for t in part[y * c : y * c + c]], 1) for y in range(r)])
            cells = picture.unfold(0, m, m).unfold(1, m, m).permute(0, 1, 3, 4, 2).flatten(2)
            found.append(torch.cat([cells, projector.newline.expand(len(cells), 1, -1)], 1).flatten(0, 1))
        tokens += [found[0], projector.separator, found[1]]
        features_MPD = features_MPD[1 + rows * columns :]
    return projector.linear_out(F.gelu(projector.linear_in(torch.cat(tokens))))


@pytest.mark.parametrize("merge", [1, 2])
def test_projector_and_placement_are_those_of_a_reference_with_gradients(merge):
    generator = torch.Generator().manual_seed(0)
    projector = Projector(grid=2 * merge, vision_width=6, width=10, merge=merge, marks=True)
    for parameter in projector.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    batch = batch_of(GRIDS[:2], GRIDS[2:])
    features = torch.randn(len(batch.images), (2 * merge) ** 2, 6, generator=generator)
    weights = torch.randn(len(batch.image_rows), 10, generator=generator)
    found, expected = projector(features, batch.image_rows), reference(projector, features, GRIDS)
    torch.testing.assert_close(found, expected)
    names = [name for name, _ in projector.named_parameters()]
    ours, theirs = (torch.autograd.grad((out * weights).sum(), list(projector.parameters())) for out in (found, expected))
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_the_features_land_where_the_images_stand_and_nowhere_else():
    model, batch = model_of(), batch_of(GRIDS[:1], [], GRIDS[1:])
    placed = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: placed.append(inputs[0]))
    with torch.no_grad():
        model.logits(batch)
        expected = model.decoder.tok_embeddings(batch.input_ids).clone()
        expected[batch.image_index] = reference(model.projector, model.vision(batch.images), GRIDS)
    torch.testing.assert_close(placed[0], expected)


def test_nan_in_one_tile_stays_in_its_segment():
    model, batch = model_of(), batch_of(GRIDS[:1], GRIDS[1:2], [], GRIDS[2:])
    clean = model.logits(batch)
    tower = model.vision.forward
    model.vision.forward = lambda images: tower(images).index_fill(0, torch.tensor([5]), math.nan)  # a tile of the second image
    broken = model.logits(batch)
    own = batch.target_segment[: len(clean)] == 1
    assert broken[own].isnan().all()
    assert torch.equal(broken[~own], clean[~own])


def test_steps_with_and_without_images_train_the_same_parameters_without_a_host_sync():
    model = model_of()
    batches = [batch_of(GRIDS), batch_of([], []), batch_of([(2, 2)], []), assemble([], IMAGE_SIZE, IMAGE_TOKENS, 1)]
    squares = batch_of([], [])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for batch in [*batches, replace(squares, images=squares.images + 1)]:
        optimizer.zero_grad()
        with no_host_sync():
            loss = model(batch).loss_sum
            loss.backward()
        assert all(p.grad is not None for p in model.parameters()), "a parameter without a gradient hangs ZeRO"
        assert all(p.grad.isfinite().all() for p in model.parameters())
        has_images = batch.image_count > 0
        for mark in (model.projector.newline, model.projector.separator):
            assert bool(mark.grad.any()) is has_images
        optimizer.step()


def test_partitioned_images_alone_and_packed_are_the_same():
    model, together = model_of(), batch_of(GRIDS[:1], GRIDS[1:])
    packed = model.logits(together)
    for number, grids in enumerate((GRIDS[:1], GRIDS[1:])):
        alone = assemble([segment(number, grids)], IMAGE_SIZE, IMAGE_TOKENS, 1)
        own = together.target_segment[: together.supervised] == number
        torch.testing.assert_close(packed[: together.supervised][own], model.logits(alone)[: alone.supervised], atol=2e-5, rtol=0)
