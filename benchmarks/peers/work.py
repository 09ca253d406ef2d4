"""What every peer does to a sample: the picture to a square of uint8, the caption to token ids; so their output is that of our loader.

`pil` is what the peers' documentation shows (Pillow and torchvision's transforms); `fast` is our decoder put into theirs.
"""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from fixture import TOKENIZER
from measure import SIZE
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from data_pipeline.config import ImageConfig
from data_pipeline.read.images import load_square
from data_pipeline.text.tokenizer import Tokenizer

_SQUARE = transforms.Compose([transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()])
"""Without the usual `ToTensor`: four bytes a value would cost the peers more than they need to pay."""


def square(image: Image.Image) -> torch.Tensor:
    """[3, SIZE, SIZE] uint8 of a picture that the peer has decoded."""
    return _SQUARE(image)


def decoded_square(data: bytes, decoder: str) -> torch.Tensor:
    """uint8 of an encoded picture: [3, SIZE, SIZE] by `pil`, [SIZE, SIZE, 3], as our decoder leaves it in memory, by `fast`."""
    if decoder == "pil":
        return square(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(load_square(data, ImageConfig(size=SIZE), None).transpose(1, 2, 0))


def decoded(sample: Mapping[str, Any], decoder: str) -> tuple[torch.Tensor, list[int]]:
    """Pixels and token ids of a sample that holds an encoded `image` and its `caption`."""
    return decoded_square(sample["image"], decoder), tokens(sample["caption"])


def collate(samples: Sequence[tuple[torch.Tensor, list[int]]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Pictures [M, ...], as `decoded` gives them, and token ids of a batch of `decoded`."""
    images, captions = zip(*samples, strict=True)
    return default_collate(list(images)), list(captions)


def tokens(text: str) -> list[int]:
    """Token ids of a caption."""
    return _tokenizer().encode(text)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(TOKENIZER)
