"""The members of one sample, read without tarfile where that cannot matter."""

import inspect
import re
import tarfile

from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_tar import END, header, member, padded
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from data_pipeline.shards import tar

NAMES = st.sampled_from(
    [
        "./._a.jpg",
        "__m__/a.txt",
        "a.jpg",
        "a.txt",
        "a.JPG",
        "a.seg.png",
        "b/a.json",
        "a",
        "dir/",
        ".hidden",
        "ü.txt",
        "n" * 120 + ".txt",
        "a\0b.txt",
    ]
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


@settings(max_examples=2000)
@given(st.text("./_a\n", min_size=1, max_size=12))
@example("__a.b__\n")
@example("a/b\nc/.d")
def test_a_name_has_the_key_that_webdataset_gives_it(name):
    skipped = "/" not in name and name.startswith("__") and name.endswith("__")
    key, extension = base_plus_ext(name)
    meta = inspect.signature(tar_file_iterator).parameters["skip_meta"].default
    passed_over = key is None or skipped or re.match(meta, name)
    assert tar.split_name(name) == (None if passed_over else (key, extension.lower()))
