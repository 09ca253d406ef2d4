"""Decodes an image and brings it to the model's square: Pillow for every format, and a faster way for JPEG.

Invariant: the pixels are a pure function of (bytes, policy, augmentation key); the key comes from (seed, epoch, sample, element),
never from a worker's state. The fast way takes the same random numbers and shows the same picture; what it does not know, Pillow reads.
"""

import io
import math

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageEnhance
from torch.nn.functional import interpolate

from data_pipeline.config import ImageConfig, ImageDecoder
from data_pipeline.samples import IMAGE_FORMATS, PIXEL_LIMIT, BadSample, require_size

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by EXIF orientation."""
_SWAPPING = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
_NUMPY_TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda a: a[:, ::-1],
    Image.Transpose.ROTATE_180: lambda a: a[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda a: a[::-1],
    Image.Transpose.TRANSPOSE: lambda a: a.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda a: a.swapaxes(0, 1)[:, ::-1],
    Image.Transpose.TRANSVERSE: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda a: a.swapaxes(0, 1)[::-1],
}
"""The same, of an array [H, W, 3]."""


SCALED_SIDES = 4
"""A JPEG is scaled down while it is decoded only where this many sides of the square are left: at 2, detailed pictures came out more
than a grey level off."""

Box = tuple[float, float, float, float]
"""Left, upper, right, lower in pixels."""


def load_square(data: bytes, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray:
    """[3, size, size] uint8 of an encoded image, by the policy's decoder; augmented with `rng`.

    Raises:
        BadSample: the bytes do not decode.
    """
    if policy.decoder is ImageDecoder.fast:
        square = _fast_jpeg(data, policy, rng)
        if square is not None:
            return square
    return to_square(decode(data), policy, rng)


def decode(data: bytes) -> Image.Image:
    """RGB image as a person would see it: EXIF orientation applied, alpha over white, first frame of an animation.

    Raises:
        BadSample: the bytes do not decode, or to more pixels than are allowed.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            require_size(*image.size)
            image.load()
            upright = _upright(image)
            if upright.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")  # PIL would clip at 255
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                rgba = upright if upright.mode == "RGBA" else upright.convert("RGBA")  # one copy less of what may be 700 MB
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return upright.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise whatever hostile bytes lead them to (struct.error, KeyError, ...)
        raise BadSample(f"image does not decode: {error}") from None


def to_square(image: Image.Image, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray:
    """[3, size, size] uint8: the whole image resized bicubically with antialias; with `rng`, cropped and jittered first."""
    box = None
    if rng is not None and policy.crop:
        box = _crop_box(image.size, policy.crop, rng)
    return _jittered(image.resize((policy.size, policy.size), Image.Resampling.BICUBIC, box=box), policy, rng)


def _jittered(square: Image.Image, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray:
    if rng is not None and policy.jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            square = enhance(square).enhance(1 + policy.jitter * rng.uniform(-1, 1))
    return np.ascontiguousarray(np.asarray(square, np.uint8).transpose(2, 0, 1))


def _fast_jpeg(data: bytes, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray | None:
    """As `to_square`, for a JPEG in grey or RGB; None, with no random number drawn, where Pillow is to read it."""
    found = _decode_jpeg(data, policy)
    if found is None:
        return None
    pixels, (width, height) = found
    if rng is not None and policy.crop:
        # a crop begins between two pixels, which torch's resize cannot express; whole pixels would be another picture
        left, upper, right, lower = _crop_box((width, height), policy.crop, rng)
        across, down = pixels.shape[1] / width, pixels.shape[0] / height  # decoded at a smaller scale, perhaps
        box = (left * across, upper * down, min(right * across, pixels.shape[1]), min(lower * down, pixels.shape[0]))
        square = Image.fromarray(pixels).resize((policy.size, policy.size), Image.Resampling.BICUBIC, box=box)
        return _jittered(square, policy, rng)
    # channels last, as it lies in memory: torch's kernel for uint8 is then the one that is vectorised
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    square = interpolate(image, (policy.size, policy.size), mode="bicubic", antialias=True, align_corners=False)[0]
    if rng is None or not policy.jitter:
        return np.ascontiguousarray(square.numpy())
    return _jittered(Image.fromarray(np.ascontiguousarray(square.permute(1, 2, 0).numpy())), policy, rng)


def _decode_jpeg(data: bytes, policy: ImageConfig) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Upright pixels [H, W, 3], and the width and height that they have at full scale; None where Pillow is to judge.

    A large image is decoded at half its scale or less, as far as that leaves any crop `SCALED_SIDES` times the square.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            if header.mode not in ("RGB", "L") or header.width * header.height > PIXEL_LIMIT:
                return None
            size = header.size
            turn = _turn(header)
        if simplejpeg.decode_jpeg_header(data)[1::-1] != size:  # of two headers Pillow weighs one, and memory is taken for the other
            return None
        least = math.ceil(SCALED_SIDES * policy.size / (1 - policy.crop)) if policy.crop < 1 else 0
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least, min_factor=2)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  damaged or hostile: Pillow says whether it is readable, and why not
        return None
    if turn is not None:
        pixels = _NUMPY_TURNS[turn](pixels).copy()  # a flip of a single row counts as contiguous, and torch refuses its stride
        size = size[::-1] if turn in _SWAPPING else size
    return pixels, size


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001  an EXIF block that cannot be read orients nothing; the pixels are sound
        return None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; not by `ImageOps.exif_transpose`, which fails on tags that it need not touch."""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _crop_box(size: tuple[int, int], crop: float, rng: np.random.Generator) -> Box:
    left, upper, kept_width, kept_height = rng.uniform(size=4)
    width, height = size[0] * (1 - crop * kept_width), size[1] * (1 - crop * kept_height)
    x, y = left * (size[0] - width), upper * (size[1] - height)
    return (x, y, x + width, y + height)
