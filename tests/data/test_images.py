"""Images decode as a person would see them, hostile bytes are bad samples, and pixels are a function of their key alone.

What the fast decoder gives is compared with Pillow's, in grey levels of 255.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import ImageConfig, ImageDecoder
from data_pipeline.read import images
from data_pipeline.read.images import decode, load_square, to_square
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


def test_an_orientation_behind_the_pixels_turns_neither_the_picture_nor_its_size_in_the_index():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(halves(), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")]
    behind = data.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND")
    assert (decode(data).size, decode(behind).size) == ((20, 40), (40, 20)) == (image_size(data), image_size(behind))


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
    with pytest.raises(BadSample, match="image too large: 50000x50000"):
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
    with pytest.raises(BadSample, match="image does not decode") as refused:
        decode(data)
    assert " at 0x" not in str(refused.value), "the same bytes are bad for the same reason everywhere"


@settings(max_examples=150)
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

    from data_pipeline.opened import open_data
    from data_pipeline.read.materialise import Materialiser

    data = open_data(data_config(demo.root, images=POLICY), 0)
    elements = Materialiser(data.sources, data.tokenizer, POLICY, 0).elements(0, 5)

    def pixels(seed: int = 0, source: int = 0, epoch: int = 0, row: int = 5, disturb: bool = False) -> bytes:
        """A new materialiser each time: no state is carried from one to the next."""
        fresh = Materialiser(data.sources, data.tokenizer, POLICY, seed)
        if disturb:
            np.random.seed(1)
            fresh._picture(elements, 0, 1, 7, 7)
        return fresh._picture(elements, 0, source, epoch, row).whole().tobytes()

    assert pixels() == pixels(disturb=True)
    assert len({pixels(), pixels(seed=1), pixels(epoch=1), pixels(row=6), pixels(source=1)}) == 5
    twice = [elements[0], elements[0]]
    one = Materialiser(data.sources, data.tokenizer, POLICY, 0)
    assert one._picture(twice, 0, 0, 0, 5).whole().tobytes() != one._picture(twice, 1, 0, 0, 5).whole().tobytes()


def test_without_augmentation_every_epoch_sees_the_same_pixels():
    image, plain = halves(), ImageConfig(size=16)
    assert (to_square(image, plain, np.random.default_rng(1)) == to_square(image, plain, None)).all()


def scene(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """As detailed as a photograph: noise whose spectrum falls with the frequency, and a few hard edges."""
    rng = np.random.default_rng(5)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width) ** 1.2
    pixels = np.fft.ifft2(spectrum).real
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    pixels[:, height // 3 :, : width // 4] += 60
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).convert(mode)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def both(data: bytes, key: int | None = None, **policy: object) -> tuple[np.ndarray, np.ndarray]:
    """The squares by the fast decoder and by Pillow."""
    squares = []
    for decoder in (ImageDecoder.fast, ImageDecoder.pil):
        rng = None if key is None else np.random.default_rng(key)
        squares.append(load_square(data, ImageConfig(**{"size": 64, **policy}, decoder=decoder), rng).astype(int))
    return squares[0], squares[1]


def error(data: bytes, **policy: object) -> tuple[float, int]:
    """Mean and largest difference."""
    fast, pil = both(data, **policy)
    assert fast.shape == pil.shape
    return np.abs(fast - pil).mean(), np.abs(fast - pil).max()


@pytest.fixture
def only_the_fast_way(monkeypatch):
    """What falls back to Pillow fails."""
    monkeypatch.setattr(images, "decode", lambda _: pytest.fail("decoded by Pillow"))


JPEG = {"quality": 90}
EDGE = {"quality": 90, "subsampling": 0}


@pytest.mark.parametrize("size", [(100, 61), (64, 64), (33, 120), (1, 1), (1, 90)])
@pytest.mark.parametrize("options", [JPEG, EDGE, {**JPEG, "progressive": True}, {**JPEG, "subsampling": 1}])
def test_fast_jpeg_is_what_pillow_gives(size, options):
    """Within rounding: of a tall picture torch resizes the other side first."""
    mean, largest = error(encode(scene(*size), "JPEG", **options))
    assert mean < 0.4
    assert largest <= 6


@pytest.mark.parametrize("policy", [{"crop": 0.12}, {"crop": 0.5, "jitter": 0.3}, {"jitter": 0.2}])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_jpeg_takes_the_same_crop_and_jitter(policy, orientation):
    data = encode(scene(120, 90), "JPEG", **JPEG, exif=oriented(orientation))
    for key in range(4):
        mean, largest = error(data, key=key, **policy)
        assert mean < 0.4
        assert largest <= 6
    assert (both(data, key=1, **policy)[0] != both(data, key=2, **policy)[0]).any()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 1), (1, 40), (1, 1)])
def test_fast_jpeg_turns_a_picture_of_one_row_or_column(size, orientation):
    data = encode(scene(40, 40).resize(size), "JPEG", **JPEG, exif=oriented(orientation))
    assert load_square(data, ImageConfig(size=32, tokens=1), None).shape == (3, 32, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_jpeg_is_upright(orientation, monkeypatch):
    data = encode(scene(100, 61), "JPEG", **JPEG, exif=oriented(orientation))
    assert error(data)[1] <= 2
    square = both(data)[0]
    monkeypatch.setattr(images, "decode", lambda _: pytest.fail("decoded by Pillow"))
    assert (load_square(data, ImageConfig(size=64), None) == square).all()


@pytest.mark.parametrize("width", [600, 800, 1100, 2400])
@pytest.mark.parametrize("crop", [0.0, 0.12])
def test_a_scaled_down_decode_stays_within_a_grey_level(width, crop):
    """On average; a single sample at a hard edge may differ by tens."""
    data = encode(scene(width, width * 2 // 3), "JPEG", **JPEG)
    mean, largest = error(data, key=0, crop=crop)
    assert mean < 1
    assert largest < 100


def test_no_decode_is_scaled_below_four_times_the_square(monkeypatch):
    seen = []
    decode_jpeg = images.simplejpeg.decode_jpeg

    def watch(*arguments: object, **options: object) -> np.ndarray:
        seen.append(decode_jpeg(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", watch)
    for width, height in [(40, 30), (127, 900), (500, 510), (512, 512), (1200, 1040), (3000, 520)]:
        load_square(encode(scene(width, height), "JPEG"), ImageConfig(size=64), None)
        found = seen[-1].shape[:2]
        assert found == (height, width) or min(found) >= 256
    assert seen[-1].shape[0] < 520


def test_fast_grey_and_rgb_jpegs_do_not_fall_back(only_the_fast_way):
    for data in (encode(scene(80, 60, "L"), "JPEG"), encode(scene(80, 60), "JPEG", keep_rgb=True), encode(scene(80, 60), "JPEG")):
        assert load_square(data, ImageConfig(size=16), None).shape == (3, 16, 16)


def test_a_grey_jpeg_is_grey():
    fast, pil = both(encode(scene(80, 60, "L"), "JPEG", **JPEG))
    assert np.abs(fast - pil).max() <= 2
    assert (fast[0] == fast[1]).all()


def cmyk(transform: int | None) -> bytes:
    """A CMYK JPEG; YCCK is the same planes under another Adobe marker."""
    data = bytearray(encode(scene(60, 40, "CMYK"), "JPEG", **JPEG))
    at = data.find(b"Adobe")
    if transform is not None:
        data[at + 11] = transform
    return bytes(data)


WITHOUT_A_FAST_WAY = {
    "cmyk": cmyk(None),
    "ycck": cmyk(2),
    "png": encode(scene(60, 40)),
    "16 bit": encode(Image.fromarray(np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60))),
    "palette": encode(scene(60, 40).convert("P", palette=Image.Palette.ADAPTIVE)),
    "alpha": encode(scene(60, 40, "RGBA")),
    "animated": encode(scene(60, 40), "GIF", save_all=True, append_images=[scene(60, 40).rotate(180)]),
    "webp": encode(scene(60, 40), "WEBP"),
}


@pytest.mark.parametrize("name", WITHOUT_A_FAST_WAY)
def test_everything_but_jpeg_is_pillow_bit_for_bit(name):
    fast, pil = both(WITHOUT_A_FAST_WAY[name], key=3, crop=0.2, jitter=0.2)
    assert (fast == pil).all()


def test_the_demo_s_pictures_are_what_pillow_alone_gives(demo):
    """Written out again here: what the demo trains on does not depend on the decoder, and has not changed."""
    import webdataset
    from PIL import ImageEnhance

    policy = ImageConfig(size=64, crop=0.12, jitter=0.2)
    shard = demo.source("pairs") / "train-000000.tar"
    for number, sample in zip(range(20), webdataset.WebDataset(str(shard), shardshuffle=False), strict=False):
        rng = np.random.default_rng(number)
        image = Image.open(io.BytesIO(sample["webp"])).convert("RGB")
        left, upper, kept_width, kept_height = rng.uniform(size=4)
        width, height = image.width * (1 - 0.12 * kept_width), image.height * (1 - 0.12 * kept_height)
        x, y = left * (image.width - width), upper * (image.height - height)
        square = image.resize((64, 64), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            square = enhance(square).enhance(1 + 0.2 * rng.uniform(-1, 1))
        assert (load_square(sample["webp"], policy, np.random.default_rng(number)) == np.asarray(square).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("data", [encode(halves(), "JPEG")[:-200], encode(scene(90, 90), "JPEG")[:1500], b"\xff\xd8\xff\xe0"])
def test_the_fast_decoder_calls_bad_what_pillow_calls_bad(data):
    for decoder in ImageDecoder:
        with pytest.raises(BadSample, match="image does not decode"):
            load_square(data, ImageConfig(size=16, decoder=decoder), None)


@settings(max_examples=100)
@given(st.data())
def test_the_fast_decoder_reads_what_pillow_reads(data):
    """Of damaged JPEGs: the same are bad."""
    content = bytearray(encode(scene(24, 16), "JPEG"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + 4] = data.draw(st.binary(min_size=0, max_size=6))
    outcomes = []
    for decoder in ImageDecoder:
        try:
            outcomes.append(load_square(bytes(content), ImageConfig(size=8, decoder=decoder), None).shape)
        except BadSample:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


def test_the_decoder_is_part_of_the_plan(demo):
    from demo_data import data_config

    from data_pipeline.opened import open_data

    digests = {open_data(data_config(demo.root, images=ImageConfig(size=32, tokens=4, decoder=d)), 0).plan.digest for d in ImageDecoder}
    assert len(digests) == 2


def test_a_jpeg_with_two_headers_takes_no_memory_for_the_second(monkeypatch):
    """Pillow weighs one of them; libjpeg must not be asked for the pixels of the other."""
    data = encode(halves(), "JPEG")
    start = data.index(b"\xff\xc0")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    large = data[start : start + 5] + b"\xff\xf0\xff\xf0" + data[start + 9 : end]
    decoded = []
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", lambda *_, **__: decoded.append(1))
    for twice in (data[:start] + large + data[start:], data[:end] + large + data[end:]):
        with pytest.raises(BadSample):
            load_square(twice, ImageConfig(size=16), None)
    assert decoded == []
