"""Hostile shards by number: real samples, and the damage that storage, accident or malice does to them.

Invariant: a case is a function of its number alone, so that a failure names its number and can be made again:
`python tests/support/hostile_run.py FOLDER 1234 1`.
"""

import functools
import itertools
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hostile_members import CAPTIONS, DOCUMENTS, IMAGES, good_image, pair
from raw_tar import BLOCK, END, blocks, header, member, padded, pax, seal
from tars import make_document

from data_pipeline.samples import Kind

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
AROUND = 2
"""Good samples on either side of a hostile one."""


@dataclass(frozen=True)
class Case:
    """One hostile shard."""

    family: str
    kind: Kind
    content: bytes
    keep: frozenset[str] = frozenset()
    """Keys that no excuse covers: they lie wholly before the damage, or beside it."""
    size: int = 0
    """The file is lengthened to this by a hole; 0 = as it is."""
    later: bytes | None = None
    """What the shard holds once it has been indexed, where that is another thing."""


Sample = tuple[str, bytes]
"""A key, and the tar blocks of its members."""


def case(number: int) -> Case:
    """The hostile shard of this number."""
    chance = random.Random(number)
    return FAMILIES[number % len(FAMILIES)](chance)


# Real samples.


@functools.cache
def demo_samples(name: str) -> list[Sample]:
    """The samples of a demo shard as they lie in it."""
    path = DEMO / name / "train-000000.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(m.name.partition(".")[0], m.offset, m.offset_data + m.size) for m in tar]
    found = []
    for key, run in itertools.groupby(members, lambda m: m[0]):
        parts = list(run)
        found.append((key, padded(content[parts[0][1] : parts[-1][2]])))
    return found


def good(chance: random.Random, kind: Kind, count: int, mark: str = "") -> list[Sample]:
    """Good samples of a kind, from the demo or written on the spot."""
    if not mark and chance.random() < 0.6:
        name = {Kind.pair: "pairs", Kind.document: "documents", Kind.text: chance.choice(["text", "prose"])}[kind]
        samples = demo_samples(name)
        first = chance.randrange(len(samples) - count)
        return samples[first : first + count]
    return [(f"{mark or 'k'}{i}", blocks(_good_members(chance, kind, f"{mark or 'k'}{i}"))) for i in range(count)]


def _good_members(chance: random.Random, kind: Kind, key: str) -> list[tuple[str, bytes]]:
    if kind is Kind.text:
        return [(f"{key}.txt", b"a red apple " * chance.randint(1, 60))]
    if kind is Kind.pair:
        return pair(key, good_image(chance))
    return make_document(key, ["before", *(good_image(chance)[1] for _ in range(chance.randint(1, 3))), "after"])


def some_kind(chance: random.Random) -> Kind:
    return chance.choice([Kind.pair, Kind.document, Kind.text])


def join(samples: list[Sample], end: bytes = END) -> bytes:
    return b"".join(data for _, data in samples) + end


def before(samples: list[Sample], offset: int) -> frozenset[str]:
    """Keys of the samples that end at or before `offset`."""
    ends = itertools.accumulate(len(data) for _, data in samples)
    return frozenset(key for (key, _), end in zip(samples, ends, strict=True) if end <= offset)


# Blind damage: what disks, networks and copies do.


def flips(chance: random.Random) -> Case:
    kind, samples, content = _real(chance)
    hits = [chance.randrange(len(content)) for _ in range(chance.choice([1, 1, 2, 8, 64, 512]))]
    for at in hits:
        content[at] ^= 1 << chance.randrange(8)
    return Case("bit flips", kind, bytes(content), before(samples, min(hits)))


def truncation(chance: random.Random) -> Case:
    kind, samples, content = _real(chance)
    at = chance.randrange(len(content))
    return Case("truncation", kind, bytes(content[:at]), before(samples, at))


def splice(chance: random.Random) -> Case:
    kind, samples, content = _real(chance)
    at = chance.randrange(len(content))
    at -= at % BLOCK if chance.random() < 0.5 else 0
    content[at:at] = chance.randbytes(chance.choice([1, 100, 512, 1024, 5000]))
    return Case("spliced garbage", kind, bytes(content), before(samples, at))


def hole(chance: random.Random) -> Case:
    kind, samples, content = _real(chance)
    at, length = chance.randrange(len(content)), chance.choice([1, 512, 1024, 4096, 20000])
    content[at : at + length] = bytes(len(content[at : at + length]))
    return Case("zero hole", kind, bytes(content), before(samples, at))


def swap(chance: random.Random) -> Case:
    kind, samples, content = _real(chance)
    first, second = sorted(chance.sample(range(len(content) // BLOCK), 2))
    a, b = slice(first * BLOCK, (first + 1) * BLOCK), slice(second * BLOCK, (second + 1) * BLOCK)
    content[a], content[b] = content[b], content[a]
    return Case("swapped blocks", kind, bytes(content), before(samples, first * BLOCK))


def rot(chance: random.Random) -> Case:
    """Sound when it was indexed, damaged when it is read."""
    kind, _, content = _real(chance)
    whole = bytes(content)
    if chance.random() < 0.3:
        del content[chance.randrange(len(content)) :]
    else:
        at = chance.randrange(len(content))
        content[at : at + 100] = chance.randbytes(len(content[at : at + 100]))
    return Case("rot after indexing", kind, whole, later=bytes(content))


def no_tar(chance: random.Random) -> Case:
    """Files that only call themselves tars."""
    import gzip

    _, _, content = _real(chance)
    made = [b"", bytes(chance.choice([512, 1024, 10240])), chance.randbytes(5000), gzip.compress(bytes(content)), b"<!DOCTYPE html>" * 99]
    return Case("no tar", some_kind(chance), chance.choice(made))


def lying_header(chance: random.Random) -> Case:
    """One byte or more of a real header changed, with a checksum that agrees."""
    kind, samples, content = _real(chance)
    number = chance.randrange(len(samples))
    at = sum(len(data) for _, data in samples[:number])
    raw = bytearray(content[at : at + BLOCK])
    start, length = chance.choice([(0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (0, 512)])
    for _ in range(chance.choice([1, 2, 8])):
        raw[start + chance.randrange(length)] = chance.choice([0, 0x20, 0x2F, 0x37, 0x80, 0xFF, chance.randrange(256)])
    content[at : at + BLOCK] = seal(bytes(raw))
    return Case("lying header", kind, bytes(content), before(samples, at))


def _real(chance: random.Random) -> tuple[Kind, list[Sample], bytearray]:
    kind = some_kind(chance)
    samples = good(chance, kind, chance.randint(2, 6))
    return kind, samples, bytearray(join(samples))


# Malice in headers: between good samples, checksums true.

NAMES: list[Callable[[random.Random], bytes]] = [
    lambda _: b"../../x.txt",
    lambda _: b"../" * 30 + b"x.txt",
    lambda _: b"/outside/x.txt",
    lambda _: b"..",
    lambda _: b".",
    lambda _: b"/",
    lambda _: b"",
    lambda _: b".txt",
    lambda _: b"x.",
    lambda _: b"x..txt",
    lambda _: b"x\0y.txt",
    lambda _: b"x\ny.txt",
    lambda _: b"x\r\x1b[2J.txt",
    lambda _: b"caf\xe9\xff.txt",
    lambda _: b"\xed\xa0\x80.txt",
    lambda _: b"C:\\x\\y.txt",
    lambda _: b"$(touch x);`touch y`.txt",
    lambda _: b"a" * 10_000 + b".txt",
    lambda _: b"x." + b"e" * 10_000,
    lambda _: b"d/" * 5_000 + b"x.txt",
    lambda c: c.randbytes(c.randint(1, 99)),
]
TYPES = [bytes([c]) for c in b"0\x001234567SDNVMLKxgXAZ\xff"]
SIZES: list[int | bytes] = [
    *(0, 1, 511, 512, 513, 8**11 - 1, b"77777777777 ", b"-0000001000\0", b"not a number", b"\0" * 12, b" " * 12),
    *(b"\x80" + bytes(3) + n.to_bytes(8, "big") for n in (0, 5, 1 << 33, 1 << 62, (1 << 64) - 1)),
    *(b"\xff" + (b"\xff" * 11), b"\xff" * 4 + ((1 << 64) - 1024).to_bytes(8, "big"), b"\x80" + b"\xff" * 11),
]


def names(chance: random.Random) -> Case:
    name, body = chance.choice(NAMES)(chance), b"words"
    plain = header(b"x.txt", len(body)) + padded(body)
    raw = pax([(b"path", name)]) + plain if chance.random() < 0.5 else member(name, body)
    return _between(chance, "hostile names", raw, Kind.text, mark="k")


def types(chance: random.Random) -> Case:
    kind, size = chance.choice(TYPES), chance.choice(SIZES)
    link = chance.choice([b"", b"../../x", b"/etc/passwd", b"x.txt", b"k0.txt"])
    raw = header(chance.choice([b"x.txt", b"x.png", b"../x.txt", b"k9.txt"]), size, kind, link) + chance.choice([b"", padded(b"words")])
    return _between(chance, "hostile types and sizes", raw)


def sparse(chance: random.Random) -> Case:
    real = chance.choice([0, 5, 512, 1 << 20, 1 << 33])
    raw = bytearray(header(b"x.txt", 512, b"S"))
    raw[386:398], raw[398:410] = b"%011o\0" % real, b"%011o\0" % min(real, 512)
    raw[482] = chance.choice([0, 1])
    raw[483:495] = b"%011o\0" % real
    extension = b"".join(b"%011o\0" % chance.randrange(1 << 20) for _ in range(42)) + bytes([chance.choice([0, 1])]) + bytes(7)
    body = b"".join(extension for _ in range(chance.choice([0, 1, 50]))) + b"words".ljust(512, b"\0")
    gnu = seal(bytes(raw)) + body
    huge = str(chance.choice([7, 1 << 33, 1 << 70])).encode()
    made = [
        gnu,
        pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", huge)]) + member("x.txt", huge + b"\n0\n"),
        pax([(b"GNU.sparse.map", b"0,5,"), (b"GNU.sparse.size", huge)]) + member("x.txt", b"words"),
        pax([(b"GNU.sparse.size", huge), (b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"5")]) + member("x.txt", b"words"),
        pax([(b"GNU.sparse.map", b"0,5")], b"g") + member("x.txt", b"words"),
    ]
    return _between(chance, "sparse members", chance.choice(made), end=chance.choice([END, b""]))


def extended(chance: random.Random) -> Case:
    """PAX and GNU headers with lies, chains and megabytes."""
    text = member("x.txt", b"words")
    sizes = [b"-1", b"-512", b"0", b"3", b"%d" % (1 << 40), b"1" + b"0" * 5_000]
    made: list[Callable[[], bytes]] = [
        lambda: pax([(b"size", chance.choice(sizes))]) + text,
        lambda: pax([(b"path", b"y" * 100_000 + b".txt")]) + text,
        lambda: pax([(b"path", b"caf\xe9.txt"), (b"hdrcharset", chance.choice([b"BINARY", b"\xff\xff"]))]) + text,
        lambda: pax([], raw=b"0 path=x\n") + text,
        lambda: pax([], raw=b"99999999999999999999 path=x\n") + text,
        lambda: pax([], raw=b"9" * 60_000) + text,
        lambda: pax([], raw=b"9" * 1_000_000) + text,
        lambda: pax([], raw=b"1 a=" * 5_000) + text,
        lambda: pax([(b"k%d" % i, b"v") for i in range(5_000)], b"g") + text * 50,
        lambda: pax([(b"path", b"../../every.txt")], b"g") + text * 2,
        lambda: pax([(b"mtime", b"nan"), (b"uid", b"1e999")]) + text,
        lambda: pax([(b"path", b"x.txt")]) * chance.choice([2, 100, 2_000]) + text,
        lambda: pax([(b"path", b"x.txt")], b"g") * chance.choice([2, 100, 2_000]) + text,
        lambda: (header(b"././@LongLink", 6, b"L") + padded(b"x.txt\0")) * chance.choice([2, 100, 2_000]) + text,
        lambda: header(b"././@LongLink", 0, b"L") + text,
        lambda: header(b"././@LongLink", 2_000_000, b"L") + b"n" * 2_000_000 + bytes(384) + text,
        lambda: header(b"././@LongLink", chance.choice(SIZES), chance.choice([b"L", b"K", b"x", b"g"])) + text,
        lambda: pax([(b"path", b"x.txt")]) + chance.choice([b"", bytes(512), b"\xa5" * 512]),
    ]
    return _between(chance, "extended headers", chance.choice(made)(), end=chance.choice([END, b""]))


def crowds(chance: random.Random) -> Case:
    """Very many members, of one key or of many; keys that come again."""
    many = chance.choice([300, 3_000])
    made: list[Callable[[], bytes]] = [
        lambda: b"".join(header(b"x.%d" % i, 0) for i in range(many)),
        lambda: header(b"x.txt", 0) * many,
        lambda: b"".join(header(b"x%d.txt" % i, 0) for i in range(many)),
        lambda: b"".join(member(f"x.{e}", b"words") for e in ("txt", "TXT", "Txt", "jpg", "png", "webp", "json")),
        lambda: b"".join(member(n, b"words") for n in ("x.txt", "y.txt", "x.txt", "X.txt", "./x.txt", "d/x.txt")),
    ]
    return _between(chance, "crowds of members", chance.choice(made)())


def real_hole(chance: random.Random) -> Case:
    """A member that is as huge as it says: a hole in the file system, no disk needed."""
    kind = some_kind(chance)
    samples = good(chance, kind, AROUND)
    huge = chance.choice([1 << 29, 3 << 30, 6 << 30, 1 << 36])
    name, form = chance.choice(
        [(b"x.txt", b"0"), (b"x.json", b"0"), (b"x.webp", b"0"), (b"././@LongLink", b"L"), (b"p", b"x"), (b"p", b"g")]
    )
    content = join(samples, end=header(name, b"\x80" + bytes(3) + huge.to_bytes(8, "big"), form))
    return Case(
        "huge sizes that are there", kind, content, before(samples, len(content)), size=len(content) + huge + chance.choice([0, 1024])
    )


# Malice in members: the tar is sound.


def payload(chance: random.Random) -> Case:
    """An image damaged behind its signature."""
    form, data = good_image(chance)
    content = bytearray(data)
    for _ in range(chance.choice([1, 3, 20])):
        at = chance.randrange(8, len(content))
        action = chance.randrange(4)
        if action == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif action == 1:
            content[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", chance.randbytes(4)])
        elif action == 2:
            content[at:at] = chance.randbytes(chance.randint(1, 60))
        elif at > 40:
            del content[at:]
    return _beside(chance, "damaged images", *_with_image(chance, form, bytes(content)))


def bombs(chance: random.Random) -> Case:
    name = chance.choice(list(IMAGES))
    return _beside(chance, "image bombs", *_with_image(chance, "png", IMAGES[name](chance)))


def json(chance: random.Random) -> Case:
    content = chance.choice(DOCUMENTS)(chance)
    members = [("x.json", content), ("x.0.png", good_image(chance)[1])]
    return _beside(chance, "hostile json", Kind.document, blocks(members))


def damaged_json(chance: random.Random) -> Case:
    members = make_document("x", ["caf\u00e9 \U0001f34e", good_image(chance)[1], "after"])
    content = bytearray(members[0][1])
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content))
        content[at : at + chance.randint(0, 3)] = bytes(chance.choice(b'[]{}",:\\nu0e-\xff\x00') for _ in range(chance.randint(0, 3)))
    return _beside(chance, "damaged json", Kind.document, blocks([("x.json", bytes(content)), *members[1:]]))


def captions(chance: random.Random) -> Case:
    text = chance.choice(CAPTIONS)(chance)
    if chance.random() < 0.5:
        return _beside(chance, "hostile texts", Kind.text, blocks([("x.txt", text)]))
    return _beside(chance, "hostile texts", Kind.pair, blocks([("x.png", good_image(chance)[1]), ("x.txt", text)]))


def _with_image(chance: random.Random, form: str, data: bytes) -> tuple[Kind, bytes]:
    if chance.random() < 0.5:
        return Kind.pair, blocks([(f"x.{form}", data), ("x.txt", b"words")])
    return Kind.document, blocks(make_document("x", ["before", data, "after"]))


def _between(chance: random.Random, family: str, raw: bytes, kind: Kind | None = None, end: bytes = END, mark: str = "") -> Case:
    """Hostile blocks between good samples; what follows them may be lost with them."""
    kind = kind or some_kind(chance)
    first = good(chance, kind, AROUND, mark)
    last = [(f"z{i}", data) for i, (_, data) in enumerate(good(chance, kind, AROUND, "z"))]
    return Case(family, kind, join(first, b"") + raw + join(last, end), frozenset(key for key, _ in first))


def _beside(chance: random.Random, family: str, kind: Kind, raw: bytes) -> Case:
    """A hostile sample beside good ones, none of which may be lost."""
    first, last = good(chance, kind, AROUND), good(chance, kind, AROUND, "z")
    return Case(family, kind, join(first, b"") + raw + join(last), frozenset(key for key, _ in first + last))


FAMILIES: tuple[Callable[[random.Random], Case], ...] = (
    *(flips, truncation, splice, hole, swap, rot, no_tar, lying_header, names, types, sparse, extended, crowds, real_hole),
    *(payload, flips, bombs, json, damaged_json, captions, payload, truncation, lying_header),
)
"""Those that stand twice are made twice as often."""
