"""Damage in a tar: each kind is named with its key, and all that is whole stays."""

import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexing import PAIRS, TOKENIZER, kept, statuses
from tars import cut, insert, make_document, make_image, make_pairs, member_offsets, overwrite, write_tar

from data_pipeline.samples import Kind
from data_pipeline.shards.index import OK, index_shard
from data_pipeline.shards.merge import merge
from data_pipeline.shards.tar import Damage, RawSample, walk


@settings(max_examples=60)
@given(data=st.data())
def test_truncated_tar_keeps_every_whole_sample_and_names_the_damage(tmp_path_factory, data):
    shard = write_tar(tmp_path_factory.mktemp("cut") / "a.tar", make_pairs(PAIRS))
    whole = {f"k{i}": max(end for name, _, end in member_offsets(shard) if name.startswith(f"k{i}.")) for i in range(PAIRS)}
    content_end = max(whole.values())
    size = data.draw(st.integers(0, content_end))
    found = statuses(cut(shard, size))
    expected = [key for key, end in whole.items() if end <= size]
    assert [key for key, status in found if status == OK] == expected
    assert any(status != OK for _, status in found)
    assert all(status.split(":")[0] in ("truncated tar", "unreadable tar", "missing member") for _, status in found if status != OK)


def test_truncation_inside_a_member_names_its_key(pairs):
    name, _, end = member_offsets(pairs)[7]
    assert statuses(cut(pairs, end - 1))[-1] == ("k3", f"truncated tar: {name!r} ends past the end of the file")


def test_a_sample_cut_in_its_last_member_is_not_kept_without_it(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [*make_pairs(1), ("m.png", make_image()), ("m.txt", b"apple"), ("m.json", b"{}")])
    found = statuses(cut(shard, member_offsets(shard)[-1][2] - 1))
    assert [key for key, _ in found] == ["k0", "m"]
    assert found[1][1].startswith("truncated tar: 'm.json'")


def test_garbage_between_members_keeps_what_is_before(pairs):
    offset = next(start for name, start, _ in member_offsets(pairs) if name == "k3.png")
    found = statuses(insert(pairs, offset, b"\xa5" * 512))
    assert found == [("k0", OK), ("k1", OK), ("k2", OK), ("", "garbage between members")]


def test_zero_bytes_between_members_are_not_taken_for_the_end(pairs):
    offset = next(start for name, start, _ in member_offsets(pairs) if name == "k3.png")
    found = statuses(insert(pairs, offset, bytes(4096)))
    assert [key for key, status in found if status == OK] == ["k0", "k1", "k2"]
    assert found[-1][1].startswith("data after the end marker")


@settings(max_examples=60)
@given(data=st.data())
def test_no_bytes_at_all_make_the_walk_raise(tmp_path_factory, data):
    shard = write_tar(tmp_path_factory.mktemp("hostile") / "a.tar", make_pairs(2))
    size = shard.stat().st_size
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, size - 1))
        overwrite(shard, offset, data.draw(st.binary(min_size=1, max_size=512))[: size - offset])
    assert all(isinstance(found, RawSample | Damage) for found in walk(shard))


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("k.png")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "content", [header(tarfile.XHDTYPE, 1 << 60), header(tarfile.REGTYPE, -1024), header(tarfile.XHDTYPE, 0) * 2000, b""]
)
def test_hostile_headers_are_damage(tmp_path, content):
    good = write_tar(tmp_path / "a.tar", make_pairs(1))
    first = good.read_bytes()[: 512 * 4]
    good.write_bytes(first + content)
    found = list(walk(good))
    assert [s.key for s in found if isinstance(s, RawSample)] == ["k0"]
    assert isinstance(found[-1], Damage)


def test_an_empty_file_and_an_empty_tar_do_not_stop_the_others(pairs):
    (pairs.parent / "b.tar").write_bytes(b"")
    write_tar(pairs.parent / "c.tar", [])
    for shard in sorted(pairs.parent.glob("*.tar")):
        index_shard(shard, pairs.parent, Kind.pair, TOKENIZER)
    facts = merge(pairs.parent, pairs.parent)
    assert facts.kept == PAIRS
    assert facts.damaged == {"unreadable tar": 1}


def huge_png(side: int) -> bytes:
    """A few bytes that say that they are `side` squared pixels."""
    ihdr = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + len(ihdr[4:]).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + make_image()[33:]


BAD_PAIRS = {
    "image too large": [("x.png", huge_png(13_343)), ("x.txt", b"just above the limit of 178 million")],
    "image too large:": [("x.png", huge_png(60_000)), ("x.txt", b"a bomb")],
    "image header unreadable": [("x.png", b"\x89PNG\r\n\x1a\nno picture"), ("x.txt", b"apple")],
    "text is not UTF-8": [("x.png", make_image()), ("x.txt", b"caf\xe9")],
    "missing member: txt": [("x.png", make_image())],
    "missing member: no image": [("x.txt", b"apple")],
    "empty text": [("x.png", make_image()), ("x.txt", b" \n")],
}
BAD_DOCUMENTS = {
    "json unreadable": [("x.json", b'{"texts": [')],
    "json wrong: not an object": [("x.json", b"[]")],
    "json wrong: `texts`": [("x.json", b'{"texts": ["a"], "images": []}')],
    "json wrong: exactly one": [("x.json", b'{"texts": ["a", null], "images": [null, null]}')],
    "json wrong: element": [("x.json", b'{"texts": [3], "images": [null]}')],
    "missing member: 0.png": [("x.json", b'{"texts": ["a", null], "images": [null, "0.png"]}')],
    "missing member: \\ud800": [("x.json", b'{"texts": ["a", null], "images": [null, "\\ud800"]}')],
    "missing member: json": [("x.0.png", make_image())],
    "empty document": make_document("x", [make_image()]),
    "text is not Unicode": [("x.json", b'{"texts": ["\\ud800"], "images": [null]}')],
    "image header unreadable": make_document("x", ["a", b"no picture"]),
    "json unreadable: maximum recursion": [("x.json", b"[" * 100_000)],
}


@pytest.mark.parametrize("reason", BAD_PAIRS)
def test_a_bad_pair_is_left_out_by_name_and_its_neighbours_stay(tmp_path, reason):
    found = statuses(write_tar(tmp_path / "a.tar", [*make_pairs(1), *BAD_PAIRS[reason], *[("z" + n, d) for n, d in make_pairs(1)]]))
    assert [key for key, status in found if status == OK] == ["k0", "zk0"]
    assert found[1][0] == "x"
    assert found[1][1].startswith(reason)


@pytest.mark.parametrize("reason", BAD_DOCUMENTS)
def test_a_bad_document_is_left_out_by_name_and_its_neighbours_stay(tmp_path, reason):
    good = ["some text", make_image(), "more"]
    members = [*make_document("a", good), *BAD_DOCUMENTS[reason], *make_document("z", good)]
    found = statuses(write_tar(tmp_path / "a.tar", members), Kind.document)
    assert [key for key, status in found if status == OK] == ["a", "z"]
    assert found[1][0] == "x"
    assert found[1][1].startswith(reason.partition(": maximum")[0])


def test_duplicate_keys_are_used_once_side_by_side_and_apart(tmp_path):
    pair = [("k.png", make_image()), ("k.txt", b"apple")]
    between = [("m" + n, d) for n, d in make_pairs(1)]
    assert statuses(write_tar(tmp_path / "near.tar", [*pair, *pair])) == [("k", OK), ("k", "duplicate key")]
    assert statuses(write_tar(tmp_path / "far.tar", [*pair, *between, *pair])) == [("k", OK), ("mk0", OK), ("k", "duplicate key")]


def test_names_that_are_not_utf8_have_a_key(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert kept(write_tar(tmp_path / "a.tar", [(f"{name}.png", make_image()), (f"{name}.txt", b"coffee")])) == ["caf\\xe9"]
