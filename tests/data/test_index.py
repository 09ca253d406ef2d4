"""The index: it agrees with webdataset on good tars, names every damage in bad ones and keeps all that is whole."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import cut, insert, make_document, make_image, make_pairs, member_offsets, overwrite, write_tar

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.samples import Kind
from data_pipeline.shards import index as index_module
from data_pipeline.shards.index import OK, index_shard, read_index, sidecar_path
from data_pipeline.shards.merge import merge
from data_pipeline.shards.source import ShardSource
from data_pipeline.shards.tar import Damage, RawSample, walk
from data_pipeline.text.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
TOKENIZER = Tokenizer(DEMO / "tokenizer")
PAIRS = 6


def statuses(shard: Path, kind: Kind = Kind.pair) -> list[tuple[str, str]]:
    """(key, status) of every row of the shard's new index."""
    index_shard(shard, shard.parent, kind, TOKENIZER)
    table = read_index(sidecar_path(shard, shard.parent)).table
    return list(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))


def kept(shard: Path, kind: Kind = Kind.pair) -> list[str]:
    return [key for key, status in statuses(shard, kind) if status == OK]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "source" / "a.tar", make_pairs(PAIRS))


@pytest.mark.parametrize("name", ["pairs", "text", "documents"])
def test_index_of_a_good_tar_is_what_webdataset_reads(demo, name):
    shard = demo.source(name) / "train-000000.tar"
    rows = read_index(sidecar_path(shard, shard.parent)).table.to_pylist()
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [r["key"] for r in rows] == [s["__key__"] for s in samples]
    for row, sample in zip(rows, samples, strict=True):
        assert row["status"] == OK
        for member in row["members"]:
            with shard.open("rb") as file:
                file.seek(member["offset"])
                assert file.read(member["size"]) == sample[member["extension"]]
        assert [(e["tokens"], e["width"], e["height"]) for e in row["elements"]] == expected_elements(sample)


def expected_elements(sample: dict) -> list[tuple[int, int, int]]:
    """Token counts and image sizes, by webdataset, PIL and the bare `tokenizers` alone."""
    encode = TOKENIZER._tokenizer.encode

    def text(value: str) -> tuple[int, int, int]:
        return len(encode(value, add_special_tokens=False).ids), 0, 0

    def image(data: bytes) -> tuple[int, int, int]:
        return (0, *Image.open(io.BytesIO(data)).size)

    if "json" in sample:
        document = json.loads(sample["json"])
        return [text(t) if t is not None else image(sample[i]) for t, i in zip(document["texts"], document["images"], strict=True)]
    found = [image(sample["webp"])] if "webp" in sample else []
    return [*found, text(sample["txt"].decode())]


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


def test_damage_reaches_the_merge_with_shard_and_key(pairs):
    write_tar(pairs.parent / "b.tar", BAD_PAIRS["text is not UTF-8"])
    for shard in sorted(pairs.parent.glob("*.tar")):
        index_shard(shard, pairs.parent, Kind.pair, TOKENIZER)
    facts = merge(pairs.parent, pairs.parent)
    assert facts.damaged == {"text is not UTF-8": 1}
    (line,) = ShardSource("s", pairs.parent).damaged.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["shard"], entry["key"], entry["reason"]) == ("b.tar", "x", "text is not UTF-8: byte 3")


def test_a_shard_that_cannot_be_read_now_is_not_damage(pairs, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(index_module, "walk_file", fail)
    with pytest.raises(TryAgainError, match="Input/output error"):
        index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    assert not sidecar_path(pairs, pairs.parent).exists()


def test_a_kill_while_writing_leaves_no_sidecar_that_reads_as_whole(pairs, monkeypatch):
    sidecar = sidecar_path(pairs, pairs.parent)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    assert not sidecar.exists()
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    whole = sidecar.read_bytes()
    for size in range(0, len(whole), 97):
        sidecar.write_bytes(whole[:size])
        with pytest.raises(UserError, match="xc-data index"):
            merge(pairs.parent, pairs.parent)
    assert index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    assert sidecar.read_bytes() == whole


def test_a_kill_while_merging_leaves_the_old_merge(pairs, monkeypatch):
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    before = merge(pairs.parent, pairs.parent)
    write_tar(pairs.parent / "b.tar", [("z" + n, d) for n, d in make_pairs(2)])
    index_shard(pairs.parent / "b.tar", pairs.parent, Kind.pair, TOKENIZER)
    for writes in range(5):  # rows, elements, kept, blocks, damaged; source.json is the sixth
        left = iter(range(writes))
        real = os.fsync

        def fsync(descriptor: int, left=left, real=real) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(descriptor)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", fsync)
            merge(pairs.parent, pairs.parent)
        source = ShardSource("s", pairs.parent)
        assert source.digest == before.digest
        assert len(source.kept(0, before.kept)) == before.kept
    assert merge(pairs.parent, pairs.parent).kept == before.kept + 2


def test_index_again_does_nothing_when_up_to_date_and_redoes_a_changed_shard(pairs):
    assert index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    sidecar = sidecar_path(pairs, pairs.parent)
    before = sidecar.stat().st_mtime_ns
    assert not index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    assert sidecar.stat().st_mtime_ns == before
    write_tar(pairs, make_pairs(3 * PAIRS))  # fewer would have the same size: tars are padded to 10 KB
    with pytest.raises(UserError, match=r"a\.tar changed since it was indexed"):
        merge(pairs.parent, pairs.parent)
    assert index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    assert merge(pairs.parent, pairs.parent).kept == 3 * PAIRS


def test_two_tasks_give_the_merge_of_one_process(demo, tmp_path, xc_data):
    for number in range(2):
        assert xc_data("index", demo.source("pairs"), "--tokenizer", demo.tokenizer, "--index-dir", tmp_path, "--task", f"{number}/2") == 0
    facts = merge(demo.source("pairs"), tmp_path)
    for file in [demo.source("pairs") / "source.json", *(demo.source("pairs") / facts.columns).iterdir()]:
        assert file.read_bytes() == (tmp_path / file.relative_to(demo.source("pairs"))).read_bytes()


def test_worker_processes_give_the_same_index(tmp_path, xc_data):
    members = [("k.png", make_image()), ("k.txt", b"red </s> <s> apple")]
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(name + n, d) for n, d in members])
    facts = []
    for workers in (1, 2):
        out = tmp_path / f"index{workers}"
        assert xc_data("index", tmp_path, "--tokenizer", DEMO / "tokenizer", "--index-dir", out, "--workers", workers) == 0
        facts.append(merge(tmp_path, out))
    assert facts[0] == facts[1]


def test_two_processes_on_the_same_shards_leave_one_whole_index(demo, tmp_path):
    source = demo.copy("pairs", tmp_path / "pairs")
    for sidecar in source.glob("*.index.parquet"):
        sidecar.unlink()
    command = [sys.executable, "-m", "data_pipeline.cli", "index", str(source), "--tokenizer", str(demo.tokenizer)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("3 of 3 shards" in out for out in printed)
    assert merge(source, source).digest == ShardSource("pairs", demo.source("pairs")).digest
    assert not list(source.glob(".*")), "nothing half-written is left"


def test_perceptual_hashes_may_come_later_and_then_stay(pairs, xc_data, capsys):
    def index(*options: str) -> tuple[str, str]:
        assert xc_data("index", pairs.parent, "--tokenizer", DEMO / "tokenizer", *options) == 0
        return capsys.readouterr().out.splitlines()[0].rpartition(", kind")[2], merge(pairs.parent, pairs.parent).digest

    def hashes() -> list[list[int | None]]:
        return [[e["phash"] for e in row] for row in read_index(sidecar_path(pairs, pairs.parent)).table["elements"].to_pylist()]

    write_tar(pairs, [("a.png", striped()), ("a.txt", b"stripes"), ("b.png", make_image()), ("b.txt", b"flat")])
    without = index()
    assert hashes() == [[None, None], [None, None]]
    done, digest = index("--phash")
    assert "1 indexed" in done
    assert digest == without[1], "no run changes by it"
    (stripes, text), flat = hashes()
    assert isinstance(stripes, int)
    assert (text, flat) == (None, [None, None])
    assert "0 indexed, 1 up to date" in index()[0]
    assert hashes()[0] == [stripes, None]


def striped() -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").save(out, "PNG")
    return out.getvalue()


def test_pictures_that_do_not_decode_are_damage_to_those_who_ask_for_their_looks(pairs):
    broken = bytearray(striped())
    broken[60:-20] = b"\xff" * (len(broken) - 80)
    write_tar(pairs, [*make_pairs(1), ("x.png", bytes(broken)), ("x.txt", b"header is whole"), *[("z" + n, d) for n, d in make_pairs(1)]])
    assert kept(pairs) == ["k0", "x", "zk0"]
    assert index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER, phash=True)
    table = read_index(sidecar_path(pairs, pairs.parent)).table
    assert table["status"].to_pylist()[1].startswith("image does not decode")
    assert [s == OK for s in table["status"].to_pylist()] == [True, False, True]


def test_each_element_has_a_digest_of_what_curation_compares(tmp_path):
    picture = make_image()
    documents = [
        make_document("a", ["Red  APPLE", picture]),
        make_document("b", [picture, "red apple "]),
        make_document("c", ["red apples"]),
    ]
    shard = write_tar(tmp_path / "a.tar", [m for d in documents for m in d])
    assert kept(shard, Kind.document) == ["a", "b", "c"]
    a, b, c = ([e["digest"] for e in row] for row in read_index(sidecar_path(shard, tmp_path)).table["elements"].to_pylist())
    assert a == b[::-1]
    assert len({*a, *c}) == 3


def test_another_tokenizer_is_refused_with_the_command_that_fixes_it(demo, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(json.loads((demo.tokenizer / "tokenizer.json").read_text()), indent=3))
    source = ShardSource("pairs", demo.source("pairs"))
    with pytest.raises(UserError, match=f"xc-data index {demo.source('pairs')} --tokenizer FOLDER"):
        source.require_tokenizer(Tokenizer(tmp_path).digest)


def test_content_digest_does_not_depend_on_path_or_time(pairs, tmp_path):
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(pairs, tmp_path / "elsewhere"))
    os.utime(copy, (1, 1))
    index_shard(copy, copy.parent, Kind.pair, TOKENIZER)
    assert merge(pairs.parent, pairs.parent).digest == merge(copy.parent, copy.parent).digest
    first = make_pairs(PAIRS)
    first[1] = ("k0.txt", b"red apple 1")  # as many bytes and tokens as before
    write_tar(copy, first)
    index_shard(copy, copy.parent, Kind.pair, TOKENIZER)
    assert merge(pairs.parent, pairs.parent).digest != merge(copy.parent, copy.parent).digest


def test_shards_may_move_with_their_index(demo, tmp_path):
    moved = ShardSource("pairs", demo.copy("pairs", tmp_path / "moved"))
    original = ShardSource("pairs", demo.source("pairs"))
    assert moved.digest == original.digest
    assert moved.locate(7).shard.parent == tmp_path / "moved"
    assert moved.key(7) == original.key(7)
    assert merge(moved.path, moved.path).digest == original.digest


def test_merge_names_the_shard_without_a_sidecar(demo, tmp_path):
    copy = demo.copy("pairs", tmp_path / "pairs")
    sidecar_path(copy / "train-000001.tar", copy).unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards have no index, first train-000001\.tar"):
        merge(copy, copy)
