"""Megatron-Energon, as its documentation sets it up: `energon prepare` beside the tars, a captioning data set, its savable loader."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from measure import BATCH, SHUFFLE_BUFFER, peer
from megatron.energon import CaptioningSample, DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.task_encoder.base import stateless
from work import decoded_square, square, tokens


class ByPillow(DefaultTaskEncoder):
    """Energon decodes with Pillow."""

    decoder = SampleDecoder(image_decode="pilrgb")

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        """Pixels and token ids."""
        return replace(sample, image=square(sample.image), caption=tokens(sample.caption))


class ByOurs(DefaultTaskEncoder):
    """Energon hands out bytes."""

    decoder = None

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        """Pixels and token ids."""
        return replace(sample, image=decoded_square(sample.image, "fast"), caption=tokens(sample.caption.decode()))


def prepare(shards: Path, work: Path) -> None:
    """Writes Energon's metadata beside the tars, which stay as they are."""
    fields = ("--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}')
    quietly = ("--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", "1")
    energon = Path(sys.executable).with_name("energon")
    subprocess.run([energon, "prepare", *quietly, "--split-ratio", "1,0,0", *fields, shards], check=True, stdout=sys.stderr)


def batches(shards: Path, work: Path, decoder: str) -> Iterator[int]:
    """Pictures of each batch."""
    dataset = get_train_dataset(
        str(shards),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=SHUFFLE_BUFFER,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=1),
        task_encoder=ByPillow() if decoder == "pil" else ByOurs(),
    )
    for batch in get_savable_loader(dataset):
        yield len(batch.image)


if __name__ == "__main__":
    peer(prepare, batches)
