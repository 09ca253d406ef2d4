"""Images decode as a person would see them, hostile bytes are bad samples, and pixels are a function of their key alone."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import ImageConfig
from data_pipeline.read.images import decode, to_square
from data_pipeline.samples import BadSample, image_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, form: str = "PNG", **settings: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **settings)
    return out.getvalue()


def halves(left: object = RED, right: object = BLUE, mode: str = "RGB", width: int = 40, height: int = 20) -> Image.Image:
    image = Image.new(mode, (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def near(pixel: tuple[int, ...], wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) <= tolerance


@pytest.mark.parametrize(("orientation", "first"), [(1, RED), (2, BLUE), (3, BLUE), (4, RED), (5, RED), (6, RED), (7, BLUE), (8, BLUE)])
def test_exif_orientation_is_applied(orientation, first):
    """The pixel that is upper left after turning, for a picture stored red | blue."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(halves(), "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.size == ((20, 40) if orientation >= 5 else (40, 20))
    assert near(image.getpixel((2, 2)), first)


def test_an_exif_block_that_cannot_be_read_loses_no_picture(monkeypatch):
    def fail(_: object) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    data = encode(halves(), "JPEG", exif=b"Exif\0\0no TIFF header")
    assert near(decode(data).getpixel((2, 2)), RED)
    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert near(decode(data).getpixel((2, 2)), RED)


def test_palette_with_and_without_transparency():
    palette = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert near(decode(encode(palette)).getpixel((2, 2)), RED)
    clear = palette.getpixel((39, 2))
    assert decode(encode(palette, transparency=clear)).getpixel((39, 2)) == WHITE


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_alpha_is_put_on_white(form):
    image = halves((*RED, 255), (*BLUE, 0), "RGBA")
    options = {"lossless": True} if form == "WEBP" else {}
    decoded = decode(encode(image, form, **options))
    assert decoded.mode == "RGB"
    assert (decoded.getpixel((2, 2)), decoded.getpixel((39, 2))) == (RED, WHITE)
    half = decode(encode(Image.new("LA", (4, 4), (0, 128))))
    assert near(half.getpixel((1, 1)), (127, 127, 127), 1)


def test_cmyk_keeps_its_colours():
    assert near(decode(encode(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG", quality=95)).getpixel((2, 2)), RED)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 40).astype(np.uint16)[None].repeat(4, 0)
    decoded = np.asarray(decode(encode(Image.fromarray(values))))
    assert decoded.shape == (4, 40, 3)
    assert np.abs(decoded[0, :, 0].astype(int) - np.linspace(0, 255, 40)).max() <= 1


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert near(decode(data).getpixel((4, 4)), RED)
    assert image_size(data) == (8, 8)


def png_of_size(width: int, height: int) -> bytes:
    """A small file that says it is large."""
    data = bytearray(encode(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_a_decompression_bomb_is_a_bad_sample_before_it_is_decoded():
    for data in (png_of_size(50_000, 50_000), png_of_size(70_000, 1)):
        with pytest.raises(BadSample, match=r"image (too large|header unreadable)"):
            image_size(data)
    with pytest.raises(BadSample, match="decompression bomb"):
        decode(png_of_size(50_000, 50_000))


@pytest.mark.parametrize("form", ["EPS", "PPM"])
def test_formats_that_nobody_publishes_are_never_opened(form):
    """Pillow has a program run EPS files, whatever a member is called."""
    data = encode(halves(), form)
    with pytest.raises(BadSample):
        image_size(data)
    with pytest.raises(BadSample):
        decode(data)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff", encode(halves())[:60], encode(halves(), "JPEG")[:-200]])
def test_garbage_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="image does not decode"):
        decode(data)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_bytes_decode_or_are_bad_but_never_raise(form, data):
    content = bytearray(encode(halves(width=16, height=8), form))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 4] = data.draw(st.binary(min_size=0, max_size=8))
    for read in (decode, image_size):
        try:
            read(bytes(content))
        except BadSample:
            continue


def test_the_square_is_the_whole_picture():
    square = to_square(halves(width=300, height=100), ImageConfig(size=32), None)
    assert (square.shape, square.dtype) == ((3, 32, 32), np.uint8)
    assert near(tuple(square[:, 16, 1]), RED)
    assert near(tuple(square[:, 16, 30]), BLUE)


POLICY = ImageConfig(size=16, tokens=4, crop=0.5, jitter=0.5)


def test_augmentation_is_a_function_of_seed_epoch_row_and_element(demo, tmp_path):
    from demo_data import data_config

    from data_pipeline.loader import open_data
    from data_pipeline.read.materialise import Materialiser

    data = open_data(data_config(demo.root, images=POLICY), 0)
    elements = Materialiser(data.sources, data.tokenizer, POLICY, 0).elements(0, 5)

    def pixels(seed: int = 0, source: int = 0, epoch: int = 0, row: int = 5, disturb: bool = False) -> bytes:
        """A new materialiser each time: no state is carried from one to the next."""
        fresh = Materialiser(data.sources, data.tokenizer, POLICY, seed)
        if disturb:
            np.random.seed(1)
            fresh._pixels(elements, 0, 1, 7, 7)
        return fresh._pixels(elements, 0, source, epoch, row).tobytes()

    assert pixels() == pixels(disturb=True)
    assert len({pixels(), pixels(seed=1), pixels(epoch=1), pixels(row=6), pixels(source=1)}) == 5
    twice = [elements[0], elements[0]]
    one = Materialiser(data.sources, data.tokenizer, POLICY, 0)
    assert one._pixels(twice, 0, 0, 0, 5).tobytes() != one._pixels(twice, 1, 0, 0, 5).tobytes()


def test_without_augmentation_every_epoch_sees_the_same_pixels():
    image, plain = halves(), ImageConfig(size=16)
    assert (to_square(image, plain, np.random.default_rng(1)) == to_square(image, plain, None)).all()
