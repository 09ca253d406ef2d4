"""mosaicml-streaming, as its documentation sets it up: MDS shards written once, a StreamingDataset that decodes, torch's DataLoader."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import BATCH, peer
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from torch.utils.data import default_collate
from work import decoded_square, tokens


class Pairs(StreamingDataset):
    """Pictures and token ids."""

    def __init__(self, folder: Path, decoder: str) -> None:
        super().__init__(local=str(folder), shuffle=True, batch_size=BATCH)
        self.decoder = decoder

    def __getitem__(self, at: Any) -> tuple[Any, list[int]]:
        sample = super().__getitem__(at)
        return decoded_square(sample["image"], self.decoder), tokens(sample["caption"])


def prepare(shards: Path, work: Path) -> None:
    """Copies the tars into MDS shards."""
    from webdataset import WebDataset

    folder = work / "mosaic"
    shutil.rmtree(folder, ignore_errors=True)
    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str"}) as out:
        for sample in WebDataset(sorted(str(tar) for tar in shards.glob("*.tar")), shardshuffle=False):
            out.write({"image": sample["jpg"], "caption": sample["txt"].decode()})


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    pairs = Pairs(work / "mosaic", decoder)
    for images, _ in StreamingDataLoader(pairs, batch_size=BATCH, num_workers=1, collate_fn=_collate):
        yield len(images)


def _collate(samples: list[tuple[Any, list[int]]]) -> tuple[Any, list[list[int]]]:
    images, captions = zip(*samples, strict=True)
    return default_collate(list(images)), list(captions)


if __name__ == "__main__":
    peer(prepare, batches)
