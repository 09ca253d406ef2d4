"""The members of one sample, read without tarfile where that cannot matter."""

import tarfile

from hypothesis import given
from hypothesis import strategies as st
from raw_tar import END, header, member, padded

from data_pipeline.shards import tar

NAMES = st.sampled_from(
    ["a.jpg", "a.txt", "a.JPG", "a.seg.png", "b/a.json", "a", "dir/", ".hidden", "ü.txt", "n" * 120 + ".txt", "a\0b.txt"]
)
KINDS = st.sampled_from([b"0", b"\0", b"5", b"2", b"1", b"7", b"g", b"x", b"S"])
MEMBERS = st.tuples(NAMES, st.binary(max_size=700), st.one_of(st.just(b"0"), KINDS)).map(lambda m: member(m[0], m[1], m[2]))
ODD = st.sampled_from(
    [
        header(b"a.jpg", 5, prefix=b"folder") + padded(b"12345"),
        header(b"a.jpg", b"\x80" + bytes(10) + b"\x05") + padded(b"12345"),
        header(b"a.jpg", b"000000000010") + padded(b"12345678"),
        header(b"a.jpg", b"       5 \0  ") + padded(b"12345"),
        header(b"a.jpg", 2000) + padded(b"cut"),
        END,
    ]
)


@given(st.lists(st.one_of(MEMBERS, MEMBERS, ODD), max_size=4).map(b"".join), st.integers(0, 3))
def test_members_are_those_that_tarfile_finds(data, cut):
    def read(plain: bool) -> dict[str, bytes] | str:
        quick = tar._plain_members
        tar._plain_members = quick if plain else lambda data: None
        try:
            return tar.read_members(data[: len(data) - cut])
        except tarfile.TarError:
            return "unreadable"
        finally:
            tar._plain_members = quick

    assert read(plain=True) == read(plain=False)


def test_a_plain_sample_is_read_without_tarfile():
    data = member("folder/7.jpg", b"x" * 1000) + member("folder/7.txt", b"a caption")
    assert tar._plain_members(data) == {"jpg": b"x" * 1000, "txt": b"a caption"}
