"""The index: it agrees with webdataset on good tars, exists whole or not at all, and is the same whoever makes it."""

import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import webdataset
from indexing import PAIRS, TOKENIZER, kept
from PIL import Image
from tars import make_document, make_image, make_pairs, write_tar

from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.samples import BadSample, Kind, image_size
from data_pipeline.shards import index as index_module
from data_pipeline.shards import merge as merge_module
from data_pipeline.shards.index import OK, ShardIndex, index_shard, read_index, sidecar_path
from data_pipeline.shards.merge import merge
from data_pipeline.shards.source import ShardSource
from data_pipeline.text.tokenizer import Tokenizer


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


def test_damage_reaches_the_merge_with_shard_and_key(pairs):
    write_tar(pairs.parent / "b.tar", [("x.png", make_image()), ("x.txt", b"caf\xe9")])
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


def test_a_second_source_with_the_same_index_dir_is_refused_and_leaves_the_first_ones_index(pairs, tmp_path):
    index_dir, other = tmp_path / "index", tmp_path / "other"
    index_shard(pairs, index_dir, Kind.pair, TOKENIZER)
    before = sidecar_path(pairs, index_dir).read_bytes()
    other.mkdir()
    write_tar(other / pairs.name, make_pairs(2))
    with pytest.raises(UserError, match=rf"is the index of a shard of {pairs.parent}, not of {other} \(give each source an --index-dir"):
        index_shard(other / pairs.name, index_dir, Kind.pair, TOKENIZER)
    assert sidecar_path(pairs, index_dir).read_bytes() == before
    write_tar(pairs, make_pairs(2))
    assert index_shard(pairs, index_dir, Kind.pair, TOKENIZER), "the source's own shard that has changed is indexed again"


def test_a_merge_leaves_what_was_merged_of_another_source_in_the_same_folder(pairs, tmp_path):
    index_dir, other = tmp_path / "index", tmp_path / "other"
    index_shard(pairs, index_dir, Kind.pair, TOKENIZER)
    merge(pairs.parent, index_dir)
    before = (index_dir / "source.json").read_bytes()
    other.mkdir()
    write_tar(other / "z.tar", make_pairs(2))
    index_shard(other / "z.tar", index_dir, Kind.pair, TOKENIZER)
    with pytest.raises(UserError, match=rf"is the index of a shard of {pairs.parent}, not of {other} \(give each source an --index-dir"):
        merge(other, index_dir)
    assert (index_dir / "source.json").read_bytes() == before


def test_an_index_beside_its_shards_is_no_other_sources(pairs, tmp_path):
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / pairs.name, make_pairs(2))
    with pytest.raises(UserError, match=rf"is the index of a shard of {pairs.parent}, not of {other}"):
        index_shard(other / pairs.name, pairs.parent, Kind.pair, TOKENIZER)


def test_an_index_folder_that_is_none_is_one_line(pairs, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write the index .*choose another folder: --index-dir"):
        index_shard(pairs, tmp_path / "file", Kind.pair, TOKENIZER)


def test_a_source_that_cannot_be_read_now_is_no_other_user_error(pairs, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(index_module.os, "scandir", fail)
        with pytest.raises(TryAgainError, match=rf"cannot read {pairs.parent}: Permission denied"):
            index_module.list_shards(pairs.parent)
    monkeypatch.setattr(index_module, "walk_file", fail)
    with pytest.raises(TryAgainError, match=rf"cannot read {pairs}: Permission denied"):
        index_module.find_kind([pairs])


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
    for writes in range(6):  # rows, elements, kept, blocks, damaged; source.json is the sixth
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


def test_a_merge_holds_one_sidecar_at_a_time(pairs, monkeypatch):
    """And leaves nothing but the merge: a source may have more rows than a machine has memory for."""
    for name in "bcd":
        write_tar(pairs.parent / f"{name}.tar", [(name + n, d) for n, d in make_pairs(2)])
    for shard in sorted(pairs.parent.glob("*.tar")):
        index_shard(shard, pairs.parent, Kind.pair, TOKENIZER)
    read: list[weakref.ref] = []

    def counted(*arguments: object) -> ShardIndex:
        assert not any(table() is not None for table in read)
        index = read_index(*arguments)
        read.append(weakref.ref(index.table))
        return index

    monkeypatch.setattr(merge_module, "read_index", counted)
    assert merge(pairs.parent, pairs.parent).kept == PAIRS + 3 * 2
    assert len(read) == 4
    assert not list(pairs.parent.glob(".*"))


def test_a_merge_while_a_shard_is_indexed_is_to_be_tried_again(pairs, monkeypatch):
    """The name of the columns says what is in them."""
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)

    def late(*arguments: object) -> ShardIndex:
        write_tar(pairs, make_pairs(3 * PAIRS))
        index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
        return read_index(*arguments)

    with monkeypatch.context() as patch, pytest.raises(TryAgainError, match=r"a\.index\.parquet changed while it was merged"):
        patch.setattr(merge_module, "read_index", late)
        merge(pairs.parent, pairs.parent)
    assert sorted(f.name for f in pairs.parent.iterdir()) == ["a.index.parquet", "a.tar"]
    assert merge(pairs.parent, pairs.parent).kept == 3 * PAIRS


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


def test_worker_processes_give_the_same_index(demo, tmp_path, xc_data):
    members = [("k.png", make_image()), ("k.txt", b"red </s> <s> apple")]
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(name + n, d) for n, d in members])
    facts = []
    for workers in (1, 2):
        out = tmp_path / f"index{workers}"
        assert xc_data("index", tmp_path, "--tokenizer", demo.tokenizer, "--index-dir", out, "--workers", workers) == 0
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


def test_perceptual_hashes_may_come_later_and_then_stay(demo, pairs, xc_data, capsys):
    def index(*options: str) -> tuple[str, str]:
        assert xc_data("index", pairs.parent, "--tokenizer", demo.tokenizer, *options) == 0
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


def test_content_digest_does_not_depend_on_the_words_of_a_library_for_damage(pairs, monkeypatch):
    write_tar(pairs, [("x.png", b"no picture"), ("x.txt", b"apple"), *make_pairs(PAIRS)])
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    ours = read_index(sidecar_path(pairs, pairs.parent))
    assert ours.table["status"][0].as_py() == "image header unreadable: of no format that is read", "Pillow names a buffer's address"

    def in_other_words(data: bytes) -> tuple[int, int]:
        try:
            return image_size(data)
        except BadSample:
            raise BadSample("image header unreadable: in the words of another version") from None

    monkeypatch.setattr(index_module, "image_size", in_other_words)
    sidecar_path(pairs, pairs.parent).unlink()
    index_shard(pairs, pairs.parent, Kind.pair, TOKENIZER)
    theirs = read_index(sidecar_path(pairs, pairs.parent))
    assert theirs.table["status"][0].as_py() != ours.table["status"][0].as_py()
    assert theirs.facts["digest"] == ours.facts["digest"]


def test_a_source_is_opened_by_its_facts_and_its_block_table_alone(demo, tmp_path):
    source = demo.copy("pairs", tmp_path / "pairs")
    read = ShardSource("s", source)
    kept = {source / "source.json", read._columns / "blocks.bin"}
    for file in [f for f in source.rglob("*") if f.is_file() and f not in kept]:
        file.unlink()
    opened = ShardSource("s", source)
    assert (opened.digest, opened.block_starts.tolist()) == (read.digest, read.block_starts.tolist())


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
