"""Tar blocks written by hand: no library writes a header that lies.

Invariant: every header has a true checksum, whatever else it claims.
"""

BLOCK = 512
END = bytes(2 * BLOCK)
"""What closes a tar."""


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"", prefix: bytes = b"") -> bytes:
    """A tar header with a true checksum; `size` may be the 12 bytes of the field."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = (
        *(name[:100].ljust(100, b"\0"), b"0000644\0" * 3, field.ljust(12, b"\0")[:12], b"0" * 11 + b"\0", b" " * 8, kind),
        *(link[:100].ljust(100, b"\0"), b"ustar\x0000", bytes(64), b"0000000\0" * 2, prefix[:155].ljust(155, b"\0"), bytes(12)),
    )
    return seal(b"".join(fields))


def seal(raw: bytes) -> bytes:
    """The header with the checksum of what it says."""
    raw = raw[:148] + b" " * 8 + raw[156:512]
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes | str, data: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A member, its name in a GNU long-name header where the field is too short."""
    name = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    long = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0") if len(name) > 100 else b""
    return long + header(name, len(data), kind, link) + padded(data)


def blocks(members: list[tuple[str, bytes]]) -> bytes:
    return b"".join(member(name, data) for name, data in members)


def pax(records: list[tuple[bytes, bytes]], kind: bytes = b"x", raw: bytes = b"") -> bytes:
    """A PAX extended header; `raw` follows its records."""
    body = raw
    for key, value in reversed(records):
        line = b" " + key + b"=" + value + b"\n"
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        body = str(length).encode() + line + body
    return header(b"././@PaxHeader", len(body), kind) + padded(body)
