"""webdataset, as its documentation sets it up: shuffled shards, a shuffle buffer, decoded by Pillow, batched in the worker."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import webdataset
from measure import BATCH, SHUFFLE_BUFFER, peer
from work import decoded_square, square, tokens


def prepare(shards: Path, work: Path) -> None:
    """Reads the tars as they are."""


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    tars = sorted(str(tar) for tar in shards.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(SHUFFLE_BUFFER)
    if decoder == "pil":
        samples = samples.decode("pil").to_tuple("jpg", "txt").map_tuple(square, tokens)
    else:
        samples = samples.to_tuple("jpg", "txt").map_tuple(partial(decoded_square, decoder=decoder), _encoded_tokens)
    for images, _ in webdataset.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=1):
        yield len(images)


def _encoded_tokens(text: bytes) -> list[int]:
    return tokens(text.decode())


if __name__ == "__main__":
    peer(prepare, batches)
