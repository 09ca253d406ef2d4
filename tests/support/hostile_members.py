"""What hostile members hold: images that lie about their size, documents without end, texts that are none.

Every maker takes a source of chance and gives bytes. Invariant: the bytes are small, however large what they claim.
"""

import functools
import io
import json
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

Maker = Callable[[random.Random], bytes]


def good_image(chance: random.Random) -> tuple[str, bytes]:
    """Extension and bytes of a sound image, in one of the ways that images come."""
    width, height = chance.randint(1, 40), chance.randint(1, 40)
    form, mode, options = chance.choice(_FORMS)
    image = Image.frombytes("RGBA", (width, height), chance.randbytes(4 * width * height))
    if mode == "I;16":
        image = Image.frombytes("I;16", (width, height), chance.randbytes(2 * width * height))
    elif mode == "CMYK":
        image = image.convert("RGB").convert("CMYK")
    else:
        image = image.convert("RGB").convert(mode) if mode in ("P", "L", "1") else image.convert(mode)
    if options.get("save_all"):
        options = {**options, "append_images": [image.rotate(90 * i) for i in range(1, 4)]}
    out = io.BytesIO()
    image.save(out, form, **options)
    return {"JPEG": "jpg", "WEBP": "webp"}.get(form, "png"), out.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    return exif


_FORMS: list[tuple[str, str, dict]] = [
    *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
    *(("JPEG", "RGB", o) for o in ({"progressive": True}, {"exif": _exif(6)}, {"subsampling": 0, "optimize": True})),
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *(("WEBP", "RGB", o) for o in ({}, {"lossless": True}, {"exif": _exif(8)}, {"save_all": True})),
    ("WEBP", "RGBA", {"lossless": True}),
    ("PNG", "RGB", {"save_all": True}),
    ("GIF", "P", {}),
    ("GIF", "P", {"save_all": True}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
]


def pair(key: str, image: tuple[str, bytes]) -> list[tuple[str, bytes]]:
    """Members of a good pair."""
    return [(f"{key}.{image[0]}", image[1]), (f"{key}.txt", f"a picture {key}".encode())]


def png(width: int, height: int, data: bytes, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """A PNG whose chunks have true checksums."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


@functools.cache
def zeros(count: int) -> bytes:
    """A zlib stream of this many zero bytes, made in pieces."""
    packer = zlib.compressobj(9)
    piece = bytes(1 << 20)
    return b"".join([*(packer.compress(piece) for _ in range(count >> 20)), packer.compress(bytes(count % (1 << 20))), packer.flush()])


_DOT = zlib.compress(b"\0\xff\0\0")


def _claims(chance: random.Random) -> tuple[int, int]:
    return chance.choice(
        [
            (0, 0),
            (0, 9),
            (1, 0),
            (65535, 65535),
            (65536, 1),
            (1 << 31, 1),
            ((1 << 31) - 1,) * 2,
            (13_000, 13_000),
            (65535, 2700),
            (1, 65535),
        ]
    )


def _png_claim(chance: random.Random) -> bytes:
    bits, colour = chance.choice([(8, 2), (16, 6), (1, 0), (8, 3)])
    return png(*_claims(chance), _DOT, bits=bits, colour=colour, interlace=chance.choice([0, 1]))


def _png_real(chance: random.Random) -> bytes:
    """Really there, and one in ten as large as the limit allows."""
    if chance.random() < 0.9:
        side, colour, channels = 1_500, *chance.choice([(0, 1), (2, 3), (6, 4)])
    else:
        side, colour, channels = 13_340, *chance.choice([(0, 1), (2, 3), (6, 4)])
    return png(side, side, zeros(side * (side * channels + 1)), colour=colour)


def _png_chunk(chance: random.Random) -> bytes:
    bomb = zeros(chance.choice([1 << 20, 1 << 26, 1 << 28]))
    made = [
        (b"zTXt", b"Comment\0\0" + bomb),
        (b"iCCP", b"icc\0\0" + bomb),
        (b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        (b"zTXt", b"Raw profile type exif\0\0" + bomb),
        (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0" * 50),
        (b"tEXt", b"a\0" + b"x" * 2_000_000),
        (b"acTL", struct.pack(">II", 0xFFFFFFFF, 0)),
    ]
    chunk = chance.choice(made)
    return png(1, 1, _DOT, *[chunk] * chance.choice([1, 1, 20]))


def _png_frames(chance: random.Random) -> bytes:
    count = 2_000
    frames = [
        chunk
        for i in range(count)
        for chunk in (
            (b"fcTL", struct.pack(">IIIIIHHBB", 2 * i, *chance.choice([(1, 1, 0, 0), (1 << 30, 1, 0, 0)]), 1, 1, 0, 0)),
            (b"fdAT", struct.pack(">I", 2 * i + 1) + _DOT),
        )
    ]
    return png(1, 1, _DOT, (b"acTL", struct.pack(">II", count, 0)), *frames)


def jpeg_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG of many scans, each of which goes over the whole picture and costs a few bytes."""
    blocks = (-(-side // 8)) ** 2
    # one Huffman code, the bit 0: "the next 16,384 blocks have nothing", with 14 bits of further blocks, also 0
    scan = _segment(0xDA, struct.pack(">BBBBBB", 1, 1, 0, 1, 63, 0)) + bytes(-(-blocks // 16384) * 15 // 8 + 1)
    frame = _segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    tables = _segment(0xDB, b"\0" + b"\1" * 64) + _segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    return b"\xff\xd8" + tables + frame + scan * scans + b"\xff\xd9"


def _segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _jpeg_claim(chance: random.Random) -> bytes:
    form = {"progressive": chance.random() < 0.5}
    out = io.BytesIO()
    Image.new(chance.choice(["RGB", "L", "CMYK"]), (16, 16), 3).save(out, "JPEG", **form)
    data = bytearray(out.getvalue())
    frame = data.index(b"\xff\xc2" if form["progressive"] else b"\xff\xc0")
    width, height = _claims(chance)
    data[frame + 5 : frame + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    return bytes(data)


def _jpeg_segments(chance: random.Random) -> bytes:
    """Thousands of application segments, EXIF blocks that point at themselves."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    entry = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    loop = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 3) + entry + b"\x87\x69\0\x04\0\0\0\x01\0\0\0\x08" * 2 + struct.pack(">I", 8)
    body = chance.choice(
        [loop, b"Exif\0\0" + chance.randbytes(200), b"ICC_PROFILE\0\x01\xff" + bytes(60_000), b"Photoshop 3.0\0" + bytes(9)]
    )
    segment = b"\xff" + bytes([chance.choice([0xE1, 0xE2, 0xED, 0xFE])]) + struct.pack(">H", len(body) + 2) + body
    return out.getvalue()[:2] + segment * chance.choice([1, 2, 300]) + out.getvalue()[2:]


def _webp_claim(chance: random.Random) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "WEBP", lossless=True)
    inner = out.getvalue()[12:]
    width, height = chance.choice([(1 << 24, 1 << 24), (16_384, 10_000), (1, 1 << 24), (8, 8)])
    extended = b"VP8X" + struct.pack("<IBBBB", 10, chance.choice([0, 2, 0xFF]), 0, 0, 0)
    extended += struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = b"ANMF" + struct.pack("<I", 16 + len(inner)) + bytes(6) + struct.pack("<I", 7)[:3] + struct.pack("<I", 7)[:3] + bytes(4) + inner
    body = b"WEBP" + extended + chance.choice([inner, b"ANIM" + struct.pack("<IIH", 6, 0, 0) + frame * chance.choice([1, 3_000])])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(chance: random.Random) -> bytes:
    width, height = chance.choice([(65535, 65535), (13_000, 13_000), (0, 0), (65535, 1)])
    frame = b"," + struct.pack("<HHHHB", 0, 0, *chance.choice([(1, 1), (width, height)]), 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * chance.choice([1, 3_000]) + b";"


def _tiff(chance: random.Random) -> bytes:
    width, height = chance.choice([(13_000, 13_000), (1 << 30, 1), (65535, 2700), (8, 8)])
    compression = chance.choice([1, 5, 7, 8, 32773])
    entries = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8 << 16), (259, 3, 1, compression << 16), (262, 3, 1, 1 << 16)),
        *((273, 4, chance.choice([1, 1 << 28]), 8), (277, 3, 1, chance.choice([1, 3, 65535]) << 16), (278, 4, 1, height)),
        (279, 4, chance.choice([1, 1 << 30]), chance.choice([4, 1 << 31])),
    ]
    table = struct.pack(">H", len(entries)) + b"".join(struct.pack(">HHII", *e) for e in entries) + struct.pack(">I", chance.choice([0, 8]))
    return b"MM\0*" + struct.pack(">I", 8) + table


def _bmp(chance: random.Random) -> bytes:
    width, height = chance.choice([(13_000, 13_000), (-1, -1), (8, -(1 << 31)), (65535, 2700), (1, 1 << 30)])
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, chance.choice([8, 24, 32]), chance.choice([0, 1, 2, 3]), 0, 1, 1, 256, 0)
    body = bytes(1024) + chance.choice([b"\xff\x01" * 40_000, b"\x00\x02\xff\xff" * 500, b""])
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 54 + 1024) + head + body


IMAGES: dict[str, Maker] = {
    "png claim": _png_claim,
    "png real": _png_real,
    "png chunk": _png_chunk,
    "png frames": _png_frames,
    "jpeg claim": _jpeg_claim,
    "jpeg scans": lambda c: jpeg_scans(*c.choice([(1_000, 300), (4_000, 3_000), (13_000, 30), (13_000, 20_000)])),
    "jpeg segments": _jpeg_segments,
    "webp claim": _webp_claim,
    "gif": _gif,
    "tiff": _tiff,
    "bmp": _bmp,
    "not offered": lambda c: c.choice(
        [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", b"P6 99999 99999 255\n", b"<svg/>", b""]
    ),
}


def _document(texts: object, images: object) -> bytes:
    return json.dumps({"texts": texts, "images": images}).encode()


DOCUMENTS: list[Maker] = [
    lambda _: b"[" * 100_000,
    lambda _: b'{"texts":' * 100_000,
    lambda _: b'{"texts": ' + b"[" * 100_000 + b"]" * 100_000 + b', "images": []}',
    lambda _: b'{"texts": [' + b"9" * 100_000 + b'], "images": [null]}',
    lambda _: b'{"texts": [NaN, Infinity, -1e999], "images": [null, null, null]}',
    lambda _: b'{"texts": ["a"], "texts": ["b", null], "images": [null], "images": [null, "0.png"]}',
    lambda _: b'{"texts": ["\\ud800"], "images": [null]}',
    lambda _: b'{"texts": ["a", null], "images": [null, "\\udfff/../0.png"]}',
    lambda _: b'{"texts": ["\\u0000\\u202e\\ufeff"], "images": [null]}',
    lambda _: '{"texts": ["a"], "images": [null]}'.encode("utf-16"),
    lambda _: b"\xef\xbb\xbf" + _document(["a"], [None]),
    lambda _: b'"' + b"a" * 3_000_000 + b'"',
    lambda c: b"[" + b"[]," * c.choice([100_000, 1_300_000, 2_000_000]) + b"[]]",
    lambda _: b'{"texts": ["a"], "images": [null], ' + b",".join(b'"%d": {}' % i for i in range(100_000)) + b"}",
    lambda c: _document(["a"] * (n := c.choice([9_000, 200_000])), [None] * n),
    lambda c: _document(["a", *[None] * (n := c.choice([900, 9_000, 90_000]))], [None, *["0.png"] * n]),
    lambda c: _document(["a", None], [None, c.choice(["../../etc/passwd", "/etc/passwd", "0.png\0", "", "0.PNG", "json", "x.0.png"])]),
    lambda c: _document(*c.choice([("a", "b"), ({}, {}), ([], []), (None, None), ([["a"]], [None]), (["a"], ["0.png"]), ([True], [None])])),
    lambda _: _document(["word " * 50_000], [None]),
    lambda _: b"null",
    lambda _: b"",
]


# Texts

CAPTIONS: list[Maker] = [
    lambda c: b"word " * c.choice([20_000, 20_000, 20_000, 200_000, 1_000_000]),
    lambda c: b"a" * c.choice([1_000_000, 5_000_000]),
    lambda _: "\u4e2d\u6587".encode() * 200_000,
    lambda _: "\ufdfa".encode() * 100_000,
    lambda _: ("e" + "\u0301" * 300_000).encode(),
    lambda _: b" \t\n" * 200_000 + b"x",
    lambda _: "\U0001f469\u200d\U0001f469".encode() * 50_000,
    lambda _: bytes(300_000),
    lambda c: c.randbytes(10_000),
    lambda _: b"\xff\xfea\0b\0",
    lambda _: b"\xef\xbb\xbf",
    lambda _: "\u2028\u00a0\u3000".encode(),
    lambda _: b"</s><s><unk>" * 5_000,
    lambda _: b"ok \xed\xa0\x80",
    lambda _: b"\xf4\x90\x80\x80",
    lambda _: "\u202e\u2066 reversed \x1b[31m".encode(),
    lambda _: b"word\n" * 10_000 + b"\xc3",
]
