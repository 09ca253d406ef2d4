"""Decodes an image and brings it to the model's square.

Invariant: the pixels are a pure function of (bytes, policy, augmentation key); the key comes from (seed, epoch, sample, element),
never from a worker's state.
"""

import io

import numpy as np
from PIL import ExifTags, Image, ImageEnhance

from data_pipeline.config import ImageConfig
from data_pipeline.samples import IMAGE_FORMATS, PIXEL_LIMIT, BadSample

Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT // 2  # PIL raises at twice this


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


def decode(data: bytes) -> Image.Image:
    """RGB image as a person would see it: EXIF orientation applied, alpha over white, first frame of an animation.

    Raises:
        BadSample: the bytes do not decode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.load()
            upright = _upright(image)
            if upright.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")  # PIL would clip at 255
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                rgba = upright.convert("RGBA")
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
    square = image.resize((policy.size, policy.size), Image.Resampling.BICUBIC, box=box)
    if rng is not None and policy.jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            square = enhance(square).enhance(1 + policy.jitter * rng.uniform(-1, 1))
    return np.ascontiguousarray(np.asarray(square, np.uint8).transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; not by `ImageOps.exif_transpose`, which fails on tags that it need not touch."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # noqa: BLE001  an EXIF block that cannot be read orients nothing; the pixels are sound
        return image
    return image if turn is None else image.transpose(turn)


def _crop_box(size: tuple[int, int], crop: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    left, upper, kept_width, kept_height = rng.uniform(size=4)
    width, height = size[0] * (1 - crop * kept_width), size[1] * (1 - crop * kept_height)
    x, y = left * (size[0] - width), upper * (size[1] - height)
    return (x, y, x + width, y + height)
