"""Shared memory in which workers hand batches over, allocated once and used again and again.

Fresh shared memory a batch costs a page fault for every 4 KiB and a file descriptor through a socket, and a pipe costs a thread that
pickles beside the one that decodes: on pictures of 490 pixels a quarter of a worker's time. Invariant: a slot is written again only after
its batch was taken out. Nobody signals that: torch's DataLoader gives a worker its next request when an earlier batch of that worker was
received, so at most `prefetch` batches of a worker are not yet received and one more is not yet taken; a worker goes round `prefetch + 1`
slots. Each slot carries the number of the batch that it holds, which is checked after the batch was copied: if the order of requests ever
were another one, the run would end.
"""

import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError

WORDS_PER_TOKEN = 8
"""Of int64 in a batch for each of its tokens, at most (ids, positions, image and target indices), and a little to spare."""


@dataclass(frozen=True)
class Handover:
    """Where a batch lies; travels from the worker in its place."""

    worker: int
    number: int
    images: int
    words: int | bytes
    """Bytes of the pickled batch without its images; those bytes themselves where they do not fit."""


class Slots:
    """`workers` x `prefetch + 1` places for a batch; made before the workers, which inherit it."""

    def __init__(self, workers: int, prefetch: int, most: int, size: int, tokens: int) -> None:
        """For uint8 images [up to `most`, 3, size, size] and as many `tokens`. UserError: the machine has not that much shared memory."""
        shape = (workers, prefetch + 1, most, 3, size, size)
        try:
            self._pixels = torch.empty(shape, dtype=torch.uint8).share_memory_()
            self._words = torch.empty((workers, prefetch + 1, 8 * WORDS_PER_TOKEN * tokens), dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            needed = f"{math.prod(shape) / 2**20:,.0f} MiB of shared memory for the pictures of {workers} workers"
            raise UserError(f"{needed}: {error} (lower data.workers or data.prefetch, or give /dev/shm more room)") from None
        self._holds = torch.full((workers, prefetch + 1), -1, dtype=torch.int64).share_memory_()
        self._number = 0

    def next(self, worker: int) -> tuple[int, np.ndarray]:
        """(number of the worker's next batch, the place [most, 3, size, size] for its pixels)."""
        number, self._number = self._number, self._number + 1
        slot = number % self._holds.shape[1]
        self._holds[worker, slot] = number
        return number, self._pixels[worker, slot].numpy()

    def lay(self, worker: int, number: int, batch: PackedBatch) -> Handover:
        """Lays the words of a batch beside its pixels, which are in their place already."""
        words = pickle.dumps(replace(batch, images=batch.images[:0].clone()), pickle.HIGHEST_PROTOCOL)
        place = self._words[worker, number % self._holds.shape[1]].numpy()
        if len(words) > len(place):
            return Handover(worker, number, len(batch.images), words)
        place[: len(words)] = np.frombuffer(words, np.uint8)
        return Handover(worker, number, len(batch.images), len(words))

    def take(self, found: Handover, pin: bool) -> PackedBatch:
        """The batch, a copy; its images [M, 3, size, size] uint8 in page-locked memory with `pin`.

        Raises:
            RuntimeError: the slot was written again meanwhile.
        """
        slot = found.number % self._holds.shape[1]
        shared = self._pixels[found.worker, slot, : found.images]
        images = torch.empty(shared.shape, dtype=torch.uint8, pin_memory=pin).copy_(shared)
        words = found.words if isinstance(found.words, bytes) else self._words[found.worker, slot, : found.words].numpy().tobytes()
        if int(self._holds[found.worker, slot]) != found.number:
            raise RuntimeError(f"worker {found.worker} wrote over its batch {found.number} before that was taken")
        return replace(pickle.loads(words), images=images)
