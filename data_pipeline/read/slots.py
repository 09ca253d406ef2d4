"""Shared memory in which workers hand batches over, allocated once and used again and again.

Fresh shared memory a batch costs a page fault for every 4 KiB and a file descriptor through a socket, and a pipe costs a thread that
pickles beside the one that decodes: on pictures of 490 pixels a quarter of a worker's time. Invariant: a slot is written again only after
its batch was taken out. Nobody signals that: torch's DataLoader gives a worker its next turn when an earlier turn of that worker was
received, so at most as many turns of a worker as are prefetched are not yet received and one more is not yet taken; a worker goes round the
slots of one turn more than are prefetched. Each slot carries the number of the batch that it holds, which is checked after the batch was
copied: if the order of turns ever were another one, the run would end.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import PackedBatch
from data_pipeline.errors import UserError

WORDS_PER_TOKEN = 10
"""Of int64 in a batch for each of its tokens, at most: ids, positions, two of an image token, three of a target; a segment of two tokens
has two and an image of one has two. The dummy image's, which are no tokens of the plan's, come to these."""
WORDS_PER_DUMMY_TOKEN = 2
"""As many: its places and its rows."""
BUCKET_TOKENS = 64
"""What T and L may be rounded up by."""


@dataclass(frozen=True)
class Handover:
    """Where a batch lies; travels from the worker in its place."""

    worker: int
    number: int
    images: int
    words: list[tuple[str, str, tuple[int, ...]]]
    """(name, dtype, shape) of the batch's other tensors, as they lie one behind the other."""
    rest: dict[str, Any]
    """What the batch holds beside tensors."""


class Slots:
    """`workers` x `places` places for a batch; made before the workers, which inherit it."""

    def __init__(self, workers: int, places: int, most: int, size: int, tokens: int, dummy: int) -> None:
        """For uint8 images [up to `most`, 3, size, size], as many `tokens`, and the `dummy` image's tokens.

        Raises:
            UserError: the machine has not that much shared memory.
        """
        shape = (workers, places, most, size, size, 3)
        words = WORDS_PER_TOKEN * (tokens + BUCKET_TOKENS) + WORDS_PER_DUMMY_TOKEN * dummy
        try:
            # channels last, as decoders write; seen from outside as [..., 3, size, size]
            self._pixels = torch.empty(shape, dtype=torch.uint8).share_memory_().movedim(-1, -3)
            self._words = torch.empty((workers, places, 8 * words), dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            needed = f"{math.prod(shape) / 2**20:,.0f} MiB of shared memory for the pictures of {workers} workers"
            raise UserError(f"{needed}: {error} (lower data.workers or data.prefetch, or give /dev/shm more room)") from None
        self._holds = torch.full((workers, places), -1, dtype=torch.int64).share_memory_()
        self._number = 0

    def next(self, worker: int) -> tuple[int, np.ndarray]:
        """(number of the worker's next batch, the place [most, 3, size, size] for its pixels)."""
        number, self._number = self._number, self._number + 1
        slot = number % self._holds.shape[1]
        self._holds[worker, slot] = number
        return number, self._pixels[worker, slot].numpy()

    def lay(self, worker: int, number: int, batch: PackedBatch) -> Handover:
        """Lays the words of a batch beside its pixels, which are in their place already."""
        arrays = {name: value.numpy() for name, value in batch.tensors().items() if name != "images"}
        arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # then each begins where its numbers may
        place = self._words[worker, number % self._holds.shape[1]].numpy()
        np.concatenate([a.reshape(-1).view(np.uint8) for a in arrays.values()], out=place[: sum(a.nbytes for a in arrays.values())])
        rest = {name: value for name, value in vars(batch).items() if not isinstance(value, Tensor)}
        return Handover(worker, number, len(batch.images), [(name, a.dtype.str, a.shape) for name, a in arrays.items()], rest)

    def take(self, found: Handover, pin: bool) -> PackedBatch:
        """The batch, a copy; its images [M, 3, size, size] uint8 in page-locked memory with `pin`.

        Raises:
            RuntimeError: the slot was written again meanwhile.
        """
        slot = found.number % self._holds.shape[1]
        shared = self._pixels[found.worker, slot, : found.images]
        images = torch.empty_like(shared, pin_memory=pin).copy_(shared)  # in the order of its bytes: a plain copy
        words, at = self._words[found.worker, slot].numpy(), 0
        tensors = {"images": images}
        for name, dtype, shape in found.words:
            array = np.empty(shape, dtype)
            array.reshape(-1).view(np.uint8)[:] = words[at : at + array.nbytes]
            tensors[name], at = torch.from_numpy(array), at + array.nbytes
        if int(self._holds[found.worker, slot]) != found.number:
            raise RuntimeError(f"worker {found.worker} wrote over its batch {found.number} before that was taken")
        return PackedBatch(**tensors, **found.rest)
