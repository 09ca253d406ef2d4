"""Hostile inputs: no crash, no hang, bounded memory, nothing written elsewhere, and every loss has a reason.

Thousands of damaged shards (tests/support/hostile.py) go through index, merge and materialisation in a process of their own. An input
that fails is made and run again alone by `python tests/support/hostile_run.py FOLDER NUMBER 1`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile_members import jpeg_scans, png, zeros
from indexing import TOKENIZER, statuses
from raw_tar import header, padded, pax, seal
from tars import make_document, make_image, make_pairs, write_tar

from data_pipeline.read.images import decode
from data_pipeline.samples import ELEMENT_LIMIT, TEXT_LIMIT, BadSample, Kind, image_size, parse
from data_pipeline.shards.index import OK, REASON_LIMIT, index_shard, read_index, sidecar_path
from data_pipeline.shards.tar import HEADER_LIMIT, NAME_LIMIT, SAMPLE_LIMIT
from data_pipeline.text.tokenizer import LONG, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "support" / "hostile_run.py"
PEAK_MIB = 3072
"""Bound on the resident memory of the process: what torch and its neighbours take, and one picture of `PIXEL_LIMIT` with alpha."""
CHUNK = 1000
CHILDREN = 2
"""Processes of the long version."""
SILENCE = 3600
"""Seconds that a child may take for its chunk; the child ends itself earlier where a single input hangs."""


def run_inputs(place: Path, first: int, count: int) -> list[dict]:
    """What became of each input; fails with the number of the one that ended the child."""
    for name in ("inputs", "cwd", "tmp", "home"):
        (place / name).mkdir(parents=True)
    before = set(place.rglob("*"))
    environment = {**os.environ, "TMPDIR": str(place / "tmp"), "HOME": str(place / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(RUNNER.parent)])
    command = [sys.executable, str(RUNNER), str(place / "inputs"), str(first), str(count)]
    with (place / "out").open("w") as out, (place / "err").open("w") as err:
        ended = subprocess.run(command, cwd=place / "cwd", env=environment, stdout=out, stderr=err, timeout=SILENCE)
    found: dict[int, dict] = {}
    for line in (place / "out").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["number"], {}).update(entry)
    last = max(found, default=first)
    assert ended.returncode == 0, f"input {last} ended the process with {ended.returncode}: {(place / 'err').read_text()[-3000:]}"
    assert set(place.rglob("*")) - before == {place / "out", place / "err"}, "files appeared outside the given folders"
    return list(found.values())


def check(inputs: list[dict]) -> None:
    """No faults, and memory within its bound at every input."""
    faults = [f"input {i['number']} ({i['family']}): {fault}" for i in inputs for fault in i["faults"]]
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:20])
    high = next((i for i in inputs if i["peak_mib"] > PEAK_MIB), None)
    assert high is None, f"input {high['number']} ({high['family']}) took memory to {high['peak_mib']:.0f} MiB"


@pytest.mark.timeout(SILENCE)
def test_a_thousand_hostile_inputs_end_in_samples_or_in_reasons(tmp_path):
    inputs = run_inputs(tmp_path / "run", 0, CHUNK)
    assert len(inputs) == CHUNK
    check(inputs)
    assert sum(i["kept"] for i in inputs) > CHUNK
    assert sum(bool(i["reasons"]) for i in inputs) > CHUNK / 2


@pytest.mark.soak
def test_ten_thousand_hostile_inputs_end_in_samples_or_in_reasons(tmp_path, capsys):
    with ThreadPoolExecutor(CHILDREN) as threads:
        chunks = threads.map(lambda first: run_inputs(tmp_path / str(first), first, CHUNK), range(0, 10 * CHUNK, CHUNK))
        inputs = [i for chunk in chunks for i in chunk]
    with capsys.disabled():
        print(f"\n{figures(inputs)}")
    assert len(inputs) == 10 * CHUNK
    check(inputs)


def figures(inputs: list[dict]) -> str:
    """The lines of docs/soak.md."""
    inputs = [i for i in inputs if "peak_mib" in i]
    reasons = Counter(reason.partition(":")[0] for i in inputs for reason in set(i["reasons"]))
    lines = [
        f"hostile inputs {len(inputs)}, samples kept {sum(i['kept'] for i in inputs)}, faults {sum(len(i['faults']) for i in inputs)}",
        f"processor seconds {sum(i['seconds'] for i in inputs):.0f}, longest input {max(i['seconds'] for i in inputs):.1f} s",
        f"peak resident memory {max(i['peak_mib'] for i in inputs):.0f} MiB",
        *(f"{count:6}  {reason}" for reason, count in reasons.most_common()),
    ]
    return "\n".join(lines)


# What the inputs found, each by name.


def text_shard(folder: Path, between: bytes, size: int = 0) -> Path:
    """A text shard with hostile blocks between its two good samples; lengthened by a hole."""
    shard = folder / "a.tar"
    words = padded(b"apple")
    shard.write_bytes(header(b"a.txt", 5) + words + between + header(b"z.txt", 5) + words + bytes(1024))
    if size:
        os.truncate(shard, size)
    return shard


def test_a_sample_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    huge = SAMPLE_LIMIT * 64
    shard = tmp_path / "a.tar"
    shard.write_bytes(header(b"a.txt", 5) + padded(b"apple") + header(b"x.txt", b"\x80" + huge.to_bytes(11, "big")))
    os.truncate(shard, shard.stat().st_size + huge)
    with shard.open("ab") as file:
        file.write(header(b"z.txt", 5) + padded(b"apple") + bytes(1024))
    assert statuses(shard, Kind.text) == [("a", OK), ("x", f"sample too large: over {SAMPLE_LIMIT} bytes"), ("z", OK)]


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_an_extended_header_of_gigabytes_is_refused_before_it_is_read(tmp_path, kind):
    shard = text_shard(tmp_path, header(b"p", 1 << 32, kind), 3 << 31)
    assert statuses(shard, Kind.text) == [("a", OK), ("", f"unreadable tar: an extended header of {1 << 32} bytes")]


def test_a_header_of_digits_does_not_hang_the_walk(tmp_path):
    """Python's tarfile looks for numbers in it in quadratic time."""
    shard = text_shard(tmp_path, pax([], raw=b"9" * (100 * HEADER_LIMIT)))
    assert statuses(shard, Kind.text)[1][1].startswith("unreadable tar: an extended header")


def test_a_sparse_header_that_the_file_cuts_is_damage(tmp_path):
    raw = bytearray(header(b"x.txt", 512, b"S"))
    raw[482] = 1
    shard = text_shard(tmp_path, seal(bytes(raw)))
    os.truncate(shard, 3 * 512)
    assert statuses(shard, Kind.text)[1][1].startswith("unreadable tar")


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6"])
def test_a_link_or_device_in_place_of_a_member_is_named_and_its_neighbours_stay(tmp_path, kind):
    found = statuses(text_shard(tmp_path, header(b"x.txt", 0, kind, b"../../secret")), Kind.text)
    assert [key for key, _ in found] == ["a", "x", "z"]
    assert found[1][1].startswith("not a plain file: 'x.txt'")
    assert (found[0][1], found[2][1]) == (OK, OK)


def test_damage_behind_a_member_that_ends_nowhere_lies_within_the_file(tmp_path):
    shard = text_shard(tmp_path, header(b"x.txt", b"\x80" + (1 << 64).to_bytes(11, "big"), b"S"))
    index_shard(shard, tmp_path, Kind.text, TOKENIZER)
    rows = read_index(sidecar_path(shard, tmp_path)).table.to_pylist()
    assert [row["key"] for row in rows] == ["a", "x", ""]
    assert rows[-1]["offset"] == shard.stat().st_size


def test_a_name_without_end_is_cut_and_named(tmp_path):
    name = b"n" * (NAME_LIMIT + 1) + b".txt"
    long = header(b"././@LongLink", len(name) + 1, b"L") + padded(name + b"\0")
    found = statuses(text_shard(tmp_path, long + header(b"x.txt", 5) + padded(b"apple")), Kind.text)
    assert found[1] == ("n" * NAME_LIMIT, f"name too long: {len(name)} characters")
    assert found[2] == ("z", OK)


def test_directories_among_members_are_no_damage(tmp_path):
    assert statuses(text_shard(tmp_path, header(b"folder/", 0, b"5")), Kind.text) == [("a", OK), ("z", OK)]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    with pytest.raises(BadSample, match="image too large: 4000x4000 in 500 scans"):
        image_size(jpeg_scans(4000, 500))
    assert image_size(jpeg_scans(4000, 20)) == (4000, 4000)


def test_what_stands_in_a_jpegs_metadata_or_behind_its_end_is_no_scan():
    jpeg, film = jpeg_scans(64, 20), b"\xff\xda\0\x08" * 500
    note = b"\xff\xed" + (len(film) + 2).to_bytes(2) + film
    assert image_size(jpeg[:2] + note + jpeg[2:] + film) == (64, 64)
    first = jpeg.index(b"\xff\xda") + 10
    with pytest.raises(BadSample, match="in 102 scans"):  # the others behind a marker that a decoder drops where it looks for a restart
        image_size(jpeg[:first] + b"\xff\x02\x7f\xfe" + jpeg_scans(64, 101)[2:])
    with pytest.raises(BadSample, match="in 101 scans"):
        image_size(jpeg[:2] + note + jpeg_scans(64, 101)[2:] + film)


def test_a_picture_with_alpha_is_held_three_times_at_most():
    """At the pixel limit each copy is 700 MB."""
    side = 3000
    data = png(side, side, zeros(side * (side * 4 + 1)), colour=6)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmHWM")
    decode(data)
    assert resident("VmHWM") - before < 3.5 * side * side * 4


def resident(name: str) -> int:
    """Bytes of this process's memory, as /proc/self/status has them under this name."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kind", list(Kind))
def test_a_text_or_json_of_megabytes_is_refused_before_it_is_parsed(kind):
    large = b"[" + b"[]," * (TEXT_LIMIT // 3 + 1)
    with pytest.raises(BadSample, match=f"text too large: {len(large)} bytes"):
        parse(kind, {"png": make_image(), "txt": large, "json": large})


def test_a_document_of_countless_elements_is_refused():
    count = ELEMENT_LIMIT + 1
    document = json.dumps({"texts": ["a"] * count, "images": [None] * count}).encode()
    with pytest.raises(BadSample, match=f"document too large: {count} elements"):
        parse(Kind.document, {"json": document})


def test_reasons_are_short_whatever_they_quote(tmp_path):
    bad = [("x.json", json.dumps({"texts": ["a", None], "images": [None, "\u202e" * 1000]}).encode())]
    shard = write_tar(tmp_path / "a.tar", [*make_document("a", ["fine"]), *bad, *make_pairs(1)])
    assert all(0 < len(status) <= REASON_LIMIT for _, status in statuses(shard, Kind.document))


def test_a_long_text_is_tokenised_once_for_its_pieces():
    text = "red apple " * LONG
    encoded, calls = TOKENIZER.encode(text), []
    fresh = Tokenizer(ROOT / "examples" / "demo" / "tokenizer")
    real = fresh._tokenizer

    class Counted:
        def encode_batch_fast(self, *arguments: object, **settings: object) -> object:
            calls.append(1)
            return real.encode_batch_fast(*arguments, **settings)

    fresh._tokenizer = Counted()
    for _ in range(3):
        ids = fresh.encode(text)
        assert ids == encoded
        ids.clear()  # what a caller does with its list is its own affair
    assert len(calls) == 1
