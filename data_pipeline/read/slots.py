"""Shared memory in which workers hand pixels over, allocated once and used again and again.

Fresh shared memory a batch costs a page fault for every 4 KiB and a file descriptor through a socket: on pictures of 490 pixels a
quarter of a worker's time. Invariant: a slot is written again only after its pixels were taken out. Nobody signals that: torch's
DataLoader gives a worker its next request when an earlier batch of that worker was received, so at most `prefetch` batches of a worker
are not yet received and one more is not yet taken; a worker goes round `prefetch + 1` slots. Each slot carries the number of the batch
that it holds, which is checked after the pixels were copied: if the order of requests ever were another one, the run would end.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Handover:
    """Where the pixels of a batch lie; travels from the worker in their place."""

    worker: int
    number: int
    images: int


class Slots:
    """`workers` x `prefetch + 1` places for uint8 images [up to `most`, 3, size, size]; made before the workers, which inherit it."""

    def __init__(self, workers: int, prefetch: int, most: int, size: int) -> None:
        """Raises UserError: the machine does not give that much shared memory."""
        shape = (workers, prefetch + 1, most, 3, size, size)
        try:
            self._pixels = torch.empty(shape, dtype=torch.uint8).share_memory_()
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

    def take(self, found: Handover, pin: bool) -> Tensor:
        """[M, 3, size, size] uint8, a copy; page-locked with `pin`.

        Raises:
            RuntimeError: the slot was written again meanwhile.
        """
        slot = found.number % self._holds.shape[1]
        shared = self._pixels[found.worker, slot, : found.images]
        images = torch.empty(shared.shape, dtype=torch.uint8, pin_memory=pin).copy_(shared)
        if int(self._holds[found.worker, slot]) != found.number:
            raise RuntimeError(f"worker {found.worker} wrote over the pixels of its batch {found.number} before they were taken")
        return images
