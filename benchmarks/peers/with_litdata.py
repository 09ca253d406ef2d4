"""litdata, as its documentation sets it up: chunks written once by `optimize`, a StreamingDataset that decodes, its own loader."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
from measure import BATCH, peer
from torch.utils.data import default_collate
from work import decoded_square, tokens


class Pairs(litdata.StreamingDataset):
    """Pictures and token ids."""

    def __init__(self, folder: Path, decoder: str) -> None:
        super().__init__(str(folder), shuffle=True)
        self.decoder = decoder

    def __getitem__(self, at: Any) -> tuple[Any, list[int]]:
        sample = super().__getitem__(at)
        return decoded_square(sample["image"], self.decoder), tokens(sample["caption"])


def prepare(shards: Path, work: Path) -> None:
    """Copies the tars into litdata's chunks."""
    folder = work / "litdata"
    shutil.rmtree(folder, ignore_errors=True)
    tars = sorted(str(tar) for tar in shards.glob("*.tar"))
    litdata.optimize(fn=_samples, inputs=tars, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)


def _samples(tar: str) -> Iterator[dict[str, Any]]:
    from webdataset import WebDataset

    for sample in WebDataset(tar, shardshuffle=False):
        yield {"image": sample["jpg"], "caption": sample["txt"].decode()}


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    pairs = Pairs(work / "litdata", decoder)
    for images, _ in litdata.StreamingDataLoader(pairs, batch_size=BATCH, num_workers=1, collate_fn=_collate):
        yield len(images)


def _collate(samples: list[tuple[Any, list[int]]]) -> tuple[Any, list[list[int]]]:
    images, captions = zip(*samples, strict=True)
    return default_collate(list(images)), list(captions)


if __name__ == "__main__":
    peer(prepare, batches)
