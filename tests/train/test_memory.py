"""Memory stays flat although every batch has other lengths."""

import random

import psutil
from batches import batch_of, image, text, tiny_model

GROWTH_MIB = 60


def test_two_hundred_batches_of_changing_shape_leave_resident_memory_where_it_was():
    model = tiny_model()
    chance = random.Random(0)

    def step() -> None:
        segments = [[image(chance.randrange(99)), text(chance.randint(3, 40), 1)] for _ in range(chance.randint(1, 12))]
        model(batch_of(segments)).loss_sum.backward()
        model.zero_grad()

    for _ in range(60):
        step()
    before = psutil.Process().memory_info().rss
    for _ in range(200):
        step()
    assert (psutil.Process().memory_info().rss - before) / 2**20 < GROWTH_MIB
