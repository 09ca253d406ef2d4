"""A collection finds pictures by their captions, reads them where they lie, and appears whole or not at all."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finished_run import write_run
from PIL import Image

from compose.cli import main
from compose.collection import FACTS, Collection, among, build
from compose.pictures import Picture, read_told
from data_pipeline.errors import UserError


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    return path


def test_pictures_of_a_source_are_found_by_their_captions(demo, collection):
    found = Collection(collection)
    keys = found._sources
    entries = found.search("the sun is shining", 200)
    assert found.size == len(entries) == 200
    assert "sun" in " ".join(e.caption for e in entries[:3])
    own = [found.search(e.caption, 3) for e in entries[:40]]
    assert all(e.caption in [o.caption for o in near] for e, near in zip(entries[:40], own, strict=True))
    four = found.retrieve(entries[5].caption, 4, set())
    assert len({p.digest for p in four}) == 4
    others = found.retrieve(entries[5].caption, 4, {four[0].digest})
    assert four[0].digest not in {p.digest for p in others}
    assert [p.digest for p in others[:3]] == [p.digest for p in four[1:]]
    assert list(keys) == [str(demo.source("heldout/unseen_picture/test"))], "read out of the source's own shards"


def test_a_folder_gives_captions_beside_pictures_and_out_of_names(tmp_path):
    folder = tmp_path / "pictures"
    picture(folder / "old_red-barn2.png", 1)
    picture(folder / "deep" / "IMG_1.JPG", 2).with_suffix(".txt").write_text("A sailing boat on a lake\n")
    picture(folder / "copyOfBarn.webp", 3)
    picture(folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    shutil.copy(folder / "copyOfBarn.webp", folder / os.fsdecode(b"caf\xe9.webp"))
    built = build(folder, tmp_path / "c")
    assert (built.pictures, built.unreadable) == (3, 2)
    found = Collection(tmp_path / "c")
    assert {e.caption for e in found.search("x", 9)} == {"old red barn2", "A sailing boat on a lake", "copy Of Barn"}
    assert found.retrieve("ship at sea", 1, set())[0].caption == "A sailing boat on a lake"
    whole = (folder / "old_red-barn2.png").read_bytes()
    (folder / "old_red-barn2.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    assert {p.caption for p in found.retrieve("a barn", 4, set())} == {"copy Of Barn", "A sailing boat on a lake"}, "no broken picture"
    (folder / "old_red-barn2.png").write_bytes(whole)
    (folder / "deep" / "IMG_1.JPG").unlink()
    assert len(found.retrieve("ship at sea", 4, set())) == 2, "a picture that is gone is passed over"
    (folder / "copyOfBarn.webp").unlink()
    found.require_pictures()
    (folder / "old_red-barn2.png").unlink()
    with pytest.raises(UserError, match="none of its 3 pictures can be read any more"):
        found.require_pictures()


def test_what_is_no_collection_or_gives_none_is_refused_and_leaves_nothing(demo, tmp_path, capsys):
    (tmp_path / "empty").mkdir()

    def refused(origin: Path, output: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["collection", "build", str(origin), "-o", str(output)])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no picture in" in refused(tmp_path / "empty", tmp_path / "c")
    assert "no folder" in refused(tmp_path / "gone", tmp_path / "c")
    assert "source of kind document" in refused(demo.source("documents"), tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]
    assert "exists" in refused(demo.source("pairs"), tmp_path / "empty")
    with pytest.raises(UserError, match="is no collection"):
        Collection(tmp_path / "empty")
    (tmp_path / "empty" / FACTS).write_text(json.dumps({"embedder": "another", "pictures": 1, "of": str(tmp_path)}))
    with pytest.raises(UserError, match="was embedded by another"):
        Collection(tmp_path / "empty")
    picture(tmp_path / "moved" / "a.png")
    build(tmp_path / "moved", tmp_path / "c")
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"its pictures lay in .*moved, which is gone"):
        Collection(tmp_path / "c")


def test_a_source_that_was_indexed_anew_is_refused_since_its_rows_are_others(demo, xc_data, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(demo.source("heldout/unseen_picture/test"), source)
    build(source, tmp_path / "c")
    assert Collection(tmp_path / "c").retrieve("the sun", 1, set())
    shutil.copy(next(iter(demo.source("pairs").glob("*.tar"))), source / "zzz.tar")
    assert xc_data("index", source, "--tokenizer", demo.tokenizer) == xc_data("merge", source) == 0
    with pytest.raises(UserError, match=r"was indexed anew since, with other rows \(build it anew\)"):
        Collection(tmp_path / "c").require_pictures()


@pytest.mark.parametrize("part", [".", "data", "_versions"])
@pytest.mark.parametrize("damage", ["gone", "cut", "turned"])
def test_a_table_that_is_gone_or_damaged_is_refused_in_one_line(collection, tmp_path, capsys, part, damage):
    folder = shutil.copytree(collection, tmp_path / "c")
    for file in [f for f in (folder / "pictures.lance" / part).rglob("*") if f.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(whole[:20] if damage == "cut" else whole[::-1])
        if damage == "gone":
            file.unlink()
    code, _, error = commanded(capsys, "search", folder, "the sun")
    assert (code, error) == (2, f"error: {folder}: its table pictures.lance is gone or damaged (build it anew)\n")
    for facts in ("", "[]", "{}", '{"of": 3, "pictures": 1}'):
        (folder / FACTS).write_text(facts)
        code, _, error = commanded(capsys, "search", folder, "the sun")
        assert (code, error.count("\n")) == (2, 1)
        assert "is no collection" in error


def test_pictures_that_are_gone_or_stand_twice_do_not_hide_the_others(tmp_path):
    for number in range(30):
        picture(tmp_path / "p" / f"barn {number}.png", number % 2)
    picture(tmp_path / "p" / "ship.png", 5)
    build(tmp_path / "p", tmp_path / "c")
    found = Collection(tmp_path / "c")
    assert {p.caption for p in found.retrieve("a barn", 3, set())} >= {"ship"}, "thirty nearer ones are two pictures"
    for number in range(30):
        (tmp_path / "p" / f"barn {number}.png").unlink()
    assert [p.caption for p in found.retrieve("a barn", 3, set())] == ["ship"]


def test_given_pictures_are_ranked_by_their_names(tmp_path):
    given = [Picture(name, name.encode()) for name in ("IMG_1.png", "church-tower.jpg", "fishing_boat.jpg")]
    find = among(given, 2)
    assert find("a ship in the harbour", set())[0].name == "fishing_boat.jpg"
    assert given[2] not in find("a ship in the harbour", {given[2].digest})


def test_given_pictures_are_ranked_by_the_text_beside_them_where_there_is_one(tmp_path):
    for number, text in enumerate(("a church tower\n", "a fishing boat", "")):
        picture(tmp_path / f"IMG_{number}.png", number)
        (tmp_path / f"IMG_{number}.txt").write_text(text)
    given = read_told(sorted(tmp_path.glob("*.png")))
    assert [p.caption for p in given] == ["a church tower", "a fishing boat", None]
    assert among(given, 1)("a ship in the harbour", set()) == [given[1]]


def commanded(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["collection", *map(str, arguments)])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


@pytest.fixture(scope="module")
def seen(demo, run_dir, tmp_path_factory) -> Path:
    """The same pictures, looked at by a model."""
    folder = tmp_path_factory.mktemp("seen") / "c"
    build(demo.source("heldout/unseen_picture/test"), folder, run_dir)
    return folder


def test_a_picture_finds_itself_scaled_and_encoded_anew_before_all_others(seen, collection, tmp_path, capsys):
    found = Collection(seen)
    for entry in found.search("a red fruit", 6):
        original = Image.open(io.BytesIO(found._read(entry).data)).convert("RGB")
        original.resize((60, 60)).save(tmp_path / "again.jpg", quality=90)
        code, out, _ = commanded(capsys, "search", seen, "--image", tmp_path / "again.jpg", "--count", 3)
        assert code == 0
        likeness, name, caption = out.splitlines()[0].split(maxsplit=2)
        assert (name, caption) == (entry.name, entry.caption)
        assert float(likeness) > 0.9
    assert [e.name for e in found.search("the sun", 5)] == [e.name for e in Collection(collection).search("the sun", 5)]


def test_a_search_by_picture_without_the_model_that_looked_is_refused(demo, seen, collection, tmp_path, capsys):
    shown = picture(tmp_path / "a.png")
    code, _, error = commanded(capsys, "search", collection, "--image", shown)
    assert (code, error.count("\n")) == (2, 1)
    assert "built without a model" in error
    moved = tmp_path / "moved"
    shutil.copytree(seen, moved)
    facts = json.loads((moved / FACTS).read_text())
    for change, said in (({"weights": "others"}, "has other weights"), ({"model": str(tmp_path / "gone")}, "no run directory")):
        (moved / FACTS).write_text(json.dumps({**facts, "sight": {**facts["sight"], **change}}))
        code, _, error = commanded(capsys, "search", moved, "--image", shown)
        assert (code, error.count("\n")) == (2, 1)
        assert said in error
    language = write_run(demo, tmp_path / "language", "language")
    shutil.rmtree(language / "final")  # its stage is found before its weights are looked for
    code, _, error = commanded(capsys, "build", shown.parent, "-o", tmp_path / "c", "--model", language)
    assert (code, error.count("\n")) == (2, 1)
    assert "has seen no picture" in error
    code, out, _ = commanded(capsys, "search", collection, "the sun is shining", "--count", 2)
    assert (code, out.count("\n")) == (0, 2)


def test_with_an_inverted_file_index_the_same_pictures_are_found(demo, collection, tmp_path, monkeypatch):
    monkeypatch.setattr("compose.collection.INDEX_FROM", 100)
    build(demo.source("heldout/unseen_picture/test"), tmp_path / "indexed")
    indexed, exact = Collection(tmp_path / "indexed"), Collection(collection)
    assert len(list(indexed._table.list_indices())) == 1
    assert not list(exact._table.list_indices())
    for text in ("the sun is shining", "a bird", "person walking"):
        assert {e.name for e in indexed.search(text, 5)} == {e.name for e in exact.search(text, 5)}


BUILD = """
import resource, sys, time
from pathlib import Path
from compose.collection import Collection, build
began = time.monotonic()
build(Path(sys.argv[1]), Path(sys.argv[2]))
seconds, found = time.monotonic() - began, Collection(Path(sys.argv[2]))
began = time.monotonic()
assert {e.caption.split()[2] for e in found.search("a golden clock", 4)} == {"clock"}
print(seconds, (time.monotonic() - began) * 1000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.soak
def test_the_memory_of_a_build_grows_by_less_than_what_it_builds(tmp_path, capsys):
    first = ["red", "blue", "old", "new", "small", "tall", "wooden", "broken", "golden", "empty"]
    second = ["round", "cold", "wet", "bright", "dark", "soft", "loud", "quiet"]
    things = ["boat", "tower", "apple", "horse", "bridge", "lamp", "chair", "river", "clock", "door"]
    peaks, sizes = {}, {}
    for count in (100_000, 400_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            if i % 50_000 == 0:
                file = picture(tmp_path / f"{i}.png", i)  # which may have so many names
            words = f"{first[i % 10]} {second[i // 10 % 8]} {things[i // 80 % 10]} {i}"
            (folder / f"{words}.png").hardlink_to(file)
        command = [sys.executable, "-c", BUILD, str(folder), str(tmp_path / f"{count}.c")]
        seconds, search_ms, mib = map(float, subprocess.run(command, check=True, text=True, capture_output=True).stdout.split())
        peaks[count] = mib
        sizes[count] = sum(f.stat().st_size for f in (tmp_path / f"{count}.c").rglob("*") if f.is_file()) >> 20
        took = f"built in {seconds:.0f} s, {sizes[count]} MiB on disk, at most {mib:.0f} MiB; {search_ms:.0f} ms a search"
        with capsys.disabled():
            print(f"\n{count:,} pictures: {took}")
        shutil.rmtree(folder)
    assert peaks[400_000] - peaks[100_000] < sizes[400_000] - sizes[100_000]
