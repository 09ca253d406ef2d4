"""Decodes an image and brings it to the model's square tiles: Pillow for every format, and a faster way for JPEG.

Invariant: the pixels are a pure function of (bytes, policy, augmentation key); the key comes from (seed, epoch, sample, element),
never from a worker's state. The fast way takes the same random numbers and shows the same picture; what it does not know, Pillow reads.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageEnhance, UnidentifiedImageError
from torch.nn.functional import interpolate

from data_pipeline.config import ImageConfig, ImageDecoder, ImageRule
from data_pipeline.plan.partition import Grid, content, grid_of, token_count
from data_pipeline.samples import IMAGE_FORMATS, PIXEL_LIMIT, BadSample, image_size, orientation, require_size

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
"""A JPEG is scaled down while it is decoded only where this many sides of what is asked for are left: at 2, detailed pictures came out more
than a grey level off."""

_RESIZERS = {
    Image.Resampling.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa.out,
    Image.Resampling.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa.out,
}
"""What torch's `interpolate` calls for an antialiased resize, but into a tensor that is there."""

Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[float, float, float, float]
"""Left, upper, right, lower in pixels."""


@dataclass(frozen=True)
class Picture:
    """An image as the ViT sees it."""

    tiles: tuple[np.ndarray, ...]
    """[3, size, size] uint8 each: one square; or the global view, then the grid's tiles in row-major order."""
    grid: Grid | None
    """Rows and columns of a partitioned image; None for one square."""
    tokens: int
    """Its tokens."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grid, where there is one."""
        return () if self.grid is None else (self.grid,)

    def whole(self) -> np.ndarray:
        """[3, H, W] uint8: the square, or the grid's tiles put together."""
        return self.tiles[0] if self.grid is None else put_together(np.stack(self.tiles[1:]), self.grid)


def image_tokens(data: bytes, policy: ImageConfig) -> int:
    """Tokens that an encoded image takes, by its header alone.

    Raises:
        BadSample: the header cannot be read.
    """
    return policy.tokens if policy.policy is ImageRule.square else int(token_count(*_grid(image_size(data), policy), policy.tokens))


def load(data: bytes, policy: ImageConfig, rng: np.random.Generator | None, room: np.ndarray | None = None) -> Picture:
    """An encoded image by the policy; augmented with `rng`; its tiles laid into `room` [at least as many, 3, size, size] uint8, if given.

    Pixels lie with their three values side by side (channels last), as decoders write them; to turn that over costs a third of a decode.

    Raises:
        BadSample: the bytes do not decode.
    """
    if policy.policy is ImageRule.square:
        return Picture((load_square(data, policy, rng, None if room is None else room[0]),), None, policy.tokens)
    size = image_size(data)
    grid = _grid(size, policy)
    picture = _load(data, content(*size, grid, policy.size), Image.Resampling.BILINEAR, policy, rng)
    tiles = cut(picture, grid, policy.size)
    if room is not None:
        tiles = tuple(np.stack(tiles, out=room[: len(tiles)]))
    return Picture(tiles, grid, int(token_count(*grid, policy.tokens)))


def cut(picture: np.ndarray, grid: Grid, side: int) -> tuple[np.ndarray, ...]:
    """[3, side, side] uint8 each: the global view of a picture [3, h, w] centred on its white grid, then the grid's tiles.

    The global view is bicubic without antialias, as in the official code, which takes it of the normalised picture; here it is rounded
    to grey levels, as all tiles are.
    """
    (rows, columns), (_, height, width) = grid, picture.shape
    canvas = np.full((rows * side, columns * side, 3), 255, np.uint8)  # channels last, as the picture lies
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    view = interpolate(torch.from_numpy(canvas).movedim(-1, 0)[None].float(), (side, side), mode="bicubic", align_corners=False)[0]
    tiles = [tile.transpose(2, 0, 1) for row in np.split(canvas, rows) for tile in np.split(row, columns, axis=1)]
    return (view.round_().clamp_(0, 255).to(torch.uint8).numpy(), *tiles)


def put_together(tiles_MCHW: np.ndarray, grid: Grid) -> np.ndarray:
    """[3, rows * side, columns * side]: the picture that the tiles of a grid show."""
    side = tiles_MCHW.shape[-1]
    return tiles_MCHW.reshape(*grid, 3, side, side).transpose(2, 0, 3, 1, 4).reshape(3, grid[0] * side, grid[1] * side)


def load_square(data: bytes, policy: ImageConfig, rng: np.random.Generator | None, out: np.ndarray | None = None) -> np.ndarray:
    """[3, size, size] uint8 of an encoded image, by the policy's decoder; augmented with `rng`; written into `out`, if given.

    Raises:
        BadSample: the bytes do not decode.
    """
    picture = _load(data, (policy.size, policy.size), Image.Resampling.BICUBIC, policy, rng, out)
    if out is None or picture is out:
        return picture
    out[:] = picture
    return out


def _grid(size: tuple[int, int], policy: ImageConfig) -> Grid:
    return grid_of(*size, policy.most_tiles, policy.size)


def _load(
    data: bytes,
    target: Size,
    filtered: Image.Resampling,
    policy: ImageConfig,
    rng: np.random.Generator | None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """[3, height, width] uint8, a view, of an encoded image at the size `target`, by the policy's decoder; augmented with `rng`.

    It is `out` itself where it could be resized to there.
    """
    if policy.decoder is ImageDecoder.fast:
        pixels = _fast_jpeg(data, target, filtered, policy, rng, out)
        if pixels is not None:
            return pixels
    return _resized(decode(data), target, filtered, policy, rng)


def decode(data: bytes) -> Image.Image:
    """RGB image as a person would see it: EXIF orientation applied, alpha over white, first frame of an animation.

    Raises:
        BadSample: the bytes do not decode, or to more pixels than are allowed.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            require_size(*image.size)
            turn = None if image.format == "TIFF" else _turn(image)  # by what stands before the pixels, as the index; load turns a TIFF
            image.load()
            upright = image if turn is None else image.transpose(turn)
            if upright.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")  # PIL would clip at 255
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                rgba = upright if upright.mode == "RGBA" else upright.convert("RGBA")  # one copy less of what may be 700 MB
                return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            return upright.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its own words name a buffer's address, another one each time
        raise BadSample("image does not decode: of no format that is read") from None
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise whatever hostile bytes lead them to (struct.error, KeyError, ...)
        raise BadSample(f"image does not decode: {error}") from None


def to_square(image: Image.Image, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray:
    """[3, size, size] uint8: the whole image resized bicubically with antialias; with `rng`, cropped and jittered first."""
    return _resized(image, (policy.size, policy.size), Image.Resampling.BICUBIC, policy, rng)


def _resized(
    image: Image.Image, target: Size, filtered: Image.Resampling, policy: ImageConfig, rng: np.random.Generator | None
) -> np.ndarray:
    box = None
    if rng is not None and policy.crop:
        box = _crop_box(image.size, policy.crop, rng)
    return _jittered(image.resize(target, filtered, box=box), policy, rng)


def _jittered(picture: Image.Image, policy: ImageConfig, rng: np.random.Generator | None) -> np.ndarray:
    if rng is not None and policy.jitter:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(1 + policy.jitter * rng.uniform(-1, 1))
    return np.asarray(picture, np.uint8).transpose(2, 0, 1)


def _fast_jpeg(
    data: bytes,
    target: Size,
    filtered: Image.Resampling,
    policy: ImageConfig,
    rng: np.random.Generator | None,
    out: np.ndarray | None,
) -> np.ndarray | None:
    """As `_resized`, for a JPEG in grey or RGB; None, with no random number drawn, where Pillow is to read it."""
    found = _decode_jpeg(data, max(target), policy.crop)
    if found is None:
        return None
    pixels, (width, height) = found
    if rng is not None and policy.crop:
        # a crop begins between two pixels, which torch's resize cannot express; whole pixels would be another picture
        left, upper, right, lower = _crop_box((width, height), policy.crop, rng)
        across, down = pixels.shape[1] / width, pixels.shape[0] / height  # decoded at a smaller scale, perhaps
        box = (left * across, upper * down, min(right * across, pixels.shape[1]), min(lower * down, pixels.shape[0]))
        return _jittered(Image.fromarray(pixels).resize(target, filtered, box=box), policy, rng)
    # channels last on both sides, as it lies in memory: torch's kernel for uint8 is then the one that is vectorised, and turns nothing over
    jittered = rng is not None and policy.jitter
    picture = np.empty((target[1], target[0], 3), np.uint8).transpose(2, 0, 1) if out is None or jittered else out
    _RESIZERS[filtered](
        torch.from_numpy(pixels).permute(2, 0, 1)[None], target[::-1], False, None, None, out=torch.from_numpy(picture)[None]
    )
    return _jittered(Image.fromarray(picture.transpose(1, 2, 0)), policy, rng) if jittered else picture


def _decode_jpeg(data: bytes, side: int, crop: float) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Upright pixels [H, W, 3], and the width and height that they have at full scale; None where Pillow is to judge.

    A large image is decoded at half its scale or less, as far as that leaves any crop `SCALED_SIDES` times the `side`.
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
        least = math.ceil(SCALED_SIDES * side / (1 - crop)) if crop < 1 else 0
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
    """As its EXIF orientation says; not by `ImageOps.exif_transpose`, which fails on tags that it need not touch."""
    return _TURNS.get(orientation(image))


def _crop_box(size: tuple[int, int], crop: float, rng: np.random.Generator) -> Box:
    left, upper, kept_width, kept_height = rng.uniform(size=4)
    width, height = size[0] * (1 - crop * kept_width), size[1] * (1 - crop * kept_height)
    x, y = left * (size[0] - width), upper * (size[1] - height)
    return (x, y, x + width, y + height)
