"""The loader on the demo's shards: the same steps for any workers, world size and restart; bad data drops its own segments only."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loader_worker
import numpy as np
import psutil
import pytest
from demo_data import COSTS, SEED, START, data_config, packs_of_step, run, run_world, same_step, segments_of
from tars import cut, overwrite
from worker_faults import FailingReads, begin_failing

from data_pipeline.config import ImageConfig, MixUnit, PhaseConfig
from data_pipeline.errors import TryAgainError, UserError
from data_pipeline.loader import Loader, StepData
from data_pipeline.opened import open_data
from data_pipeline.read import storage
from data_pipeline.read.ledger import BadEntry
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import Kind
from data_pipeline.shards.index import index_shard, read_index, sidecar_path
from data_pipeline.shards.merge import merge
from data_pipeline.text.tokenizer import Tokenizer

SOURCES = ("pairs", "documents", "text")


@pytest.fixture(scope="module")
def steps(demo) -> list[StepData]:
    """The whole epoch on one rank, uninterrupted."""
    return list(run(data_config(demo.root)))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_steps_do_not_depend_on_workers(demo, steps, workers):
    first = len(steps) - 8
    found = list(run(data_config(demo.root, workers=workers), cursor=steps[first - 1].cursor, step=first))
    assert len(found) == 8
    assert all(same_step(a, b) for a, b in zip(found, steps[first:], strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("micro_packs", [1, 2])
def test_steps_hold_the_same_segments_for_any_world_size(demo, steps, ranks, micro_packs):
    first = len(steps) - 6
    assert len({len(segments_of(m.batch)) > 0 for m in steps[-1].micro_batches}) == 2, "the last batch is to be a short one"
    config = data_config(demo.root, micro_packs=micro_packs)
    worlds = [list(run(config, rank, ranks, steps[first - 1].cursor, first)) for rank in range(ranks)]
    assert {len(world) for world in worlds} == {6}
    micro_steps = -(-8 // (ranks * micro_packs))
    assert {len(step.micro_batches) for world in worlds for step in world} == {micro_steps}
    for expected, *parts in zip(steps[first:], *worlds, strict=True):
        assert {(p.step, p.cursor, p.progress) for p in parts} == {(expected.step, expected.cursor, expected.progress)}
        assert segments([expected]) == sum((segments([p]) for p in parts), Counter())
        assert sum(p.supervised for p in parts) == expected.supervised


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0), (2, 4), (3, 2), (4, 1), (8, 0), (48, 0)])
def test_a_step_holds_the_same_packs_tensor_for_tensor_for_any_world_and_workers(demo, steps, ranks, workers):
    first = len(steps) - 3
    config = data_config(demo.root, workers=workers)
    world = run_world(config, open_data(config, SEED), ranks, steps[first - 1].cursor, first)
    for expected, parts in zip(steps[first:], world, strict=True):
        assert packs_of_step(parts) == packs_of_step([expected])
        assert len({len(part.micro_batches) for part in parts}) == 1
    assert len(packs_of_step([steps[first]])) == len(set(packs_of_step([steps[first]]))) == 8


def test_killed_at_random_steps_and_gone_on_with_in_other_worlds_it_is_the_uninterrupted_run(demo, steps, tmp_path):
    """SIGKILL to a real process; what counts is the cursor that it wrote for the last step that was consumed."""
    chance, begin = random.Random(5), 1
    cursor = steps[begin - 1].cursor
    (tmp_path / "cursor.json").write_text(json.dumps({"cursor": [cursor.window, cursor.pack], "step": begin}))
    done = tmp_path / "steps.jsonl"
    done.touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(ranks: int, workers: int, stdin: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, loader_worker.__file__, str(demo.root), str(ranks), str(workers), str(tmp_path)]
        return subprocess.Popen(command, env=environment, stdin=stdin)

    for ranks, workers in [(2, 1), (3, 0), (1, 2)]:
        kill_after = chance.randint(1, 6)
        lines_then = len(done.read_bytes().splitlines()) + kill_after
        process = start(ranks, workers, subprocess.PIPE)
        process.stdin.write(bytes(kill_after + chance.randint(0, 3)))
        process.stdin.flush()
        while len(done.read_bytes().splitlines()) < lines_then:
            assert process.poll() is None
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= ranks * workers
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not psutil.wait_procs(children, timeout=20)[1], "workers end with their trainer"
        process.stdin.close()
        with done.open("rb+") as file:  # the line that was being written
            file.truncate(file.read().rfind(b"\n") + 1)
    assert start(8, 0, subprocess.DEVNULL).wait() == 0
    lines = [json.loads(line) for line in done.read_text().splitlines()]
    assert {line["ranks"] for line in lines} == {1, 2, 3, 8}
    assert all(line["packs"] == packs_of_step([steps[line["step"]]]) for line in lines)
    assert sorted({line["step"] for line in lines}) == list(range(begin, len(steps)))
    assert len(lines) <= len(steps) - begin + 3, "a step is loaded again only where the kill came before its cursor was written"


def segments(steps: list[StepData]) -> Counter:
    """Everything that the model gets, as a multiset."""
    return Counter(segment for step in steps for m in step.micro_batches for segment in segments_of(m.batch))


def test_all_micro_batches_of_a_step_come_together_and_in_order(steps):
    for number, step in enumerate(steps):
        assert step.step == number
        assert [m.request.micro for m in step.micro_batches] == list(range(8))
    assert steps[-1].progress == 1.0
    assert [s.progress for s in steps] == sorted(s.progress for s in steps)


@pytest.mark.parametrize("after", [0, 1, 17, -2])
def test_a_resumed_run_is_the_uninterrupted_one(demo, steps, after):
    after %= len(steps)
    resumed = run(data_config(demo.root), cursor=steps[after].cursor, step=after + 1)
    for expected in steps[after + 1 : after + 5]:
        assert same_step(next(resumed), expected)


def test_a_run_resumed_at_its_end_has_no_step(demo, steps):
    assert list(run(data_config(demo.root), cursor=steps[-1].cursor, step=len(steps))) == []


def test_an_epoch_holds_every_token_and_image_exactly_once(demo, steps):
    data = open_data(data_config(demo.root), SEED)
    begin, end = data.tokenizer.begin, data.tokenizer.end
    words, ends, pictures = defaultdict(Counter), Counter(), Counter()
    for segment in segments(steps).elements():
        sample = segment.source, segment.sample
        tokens = [t for at, t in enumerate(segment.ids) if at not in segment.image_positions]
        assert tokens[0] == begin
        ends[sample] += tokens.count(end)
        words[sample].update(t for t in tokens[1:] if t != end)
        pictures[sample] += len(segment.image_positions)
    for number, source in enumerate(data.sources):
        kept = source.kept(0, source.facts.kept).tolist()
        assert {row for n, row in words if n == number} == set(kept)
        table = [row for shard in source.facts.shards for row in index_rows(source.path / shard)]
        for row in kept:
            assert ends[number, row] == 1
            assert sum(words[number, row].values()) == sum(e["tokens"] for e in table[row]["elements"])
            assert pictures[number, row] == 4 * sum(e["width"] > 0 for e in table[row]["elements"])


def index_rows(shard: Path) -> list[dict]:
    return read_index(sidecar_path(shard, shard.parent)).table.to_pylist()


def test_an_epoch_reads_the_words_that_the_shards_hold(demo, steps):
    import webdataset

    tokenizer = Tokenizer(demo.tokenizer)
    shard = demo.source("text") / "train-000000.tar"
    expected = Counter(t for s in webdataset.WebDataset(str(shard), shardshuffle=False) for t in tokenizer.encode(s["txt"].decode()))
    read = Counter(t for s in segments(steps).elements() if SOURCES[s.source] == "text" for t in s.ids)
    assert {t: n for t, n in read.items() if t not in (tokenizer.begin, tokenizer.end)} == dict(expected)


# Faults at run time. Each damages a copy of the demo and says which samples are lost by it.

Damage = Callable[[Path], set[tuple[str, str, str]]]
"""From the folder of the sources to the (source, shard, key) that are lost."""


def keys(shard: Path) -> set[tuple[str, str, str]]:
    return {(shard.parent.name, shard.name, row["key"]) for row in index_rows(shard)}


def delete_shard(root: Path) -> set[tuple[str, str, str]]:
    lost = keys(root / "pairs" / "train-000002.tar")
    (root / "pairs" / "train-000002.tar").unlink()
    return lost


def truncate_shard(root: Path) -> set[tuple[str, str, str]]:
    shard = root / "pairs" / "train-000001.tar"
    cut(shard, shard.stat().st_size // 2)
    return keys(shard)


def replace_words(root: Path) -> set[tuple[str, str, str]]:
    """Another text of the same size, in a shard of the same size."""
    shard = root / "text" / "train-000000.tar"
    row = index_rows(shard)[40]
    overwrite(shard, row["members"][0]["offset"], b"zz")
    return {("text", shard.name, row["key"])}


def replace_header(root: Path) -> set[tuple[str, str, str]]:
    shard = root / "documents" / "train-000000.tar"
    row = index_rows(shard)[3]
    overwrite(shard, row["offset"], bytes(512))
    return {("documents", shard.name, row["key"])}


def corrupt_pixels_before_indexing(root: Path) -> set[tuple[str, str, str]]:
    """The image's header is whole, so that the index takes it."""
    shard = root / "pairs" / "train-000000.tar"
    lost = set()
    for row in index_rows(shard)[5:9]:
        picture = next(m for m in row["members"] if m["extension"] == "webp")
        overwrite(shard, picture["offset"] + 40, b"\xff" * (picture["size"] - 40))
        lost.add(("pairs", shard.name, row["key"]))
    assert index_shard(shard, shard.parent, Kind.pair, Tokenizer(root / "tokenizer"))
    assert merge(shard.parent, shard.parent).damaged == {}
    return lost


FAULTS = {
    "shard is missing": delete_shard,
    "shard changed since it was indexed": truncate_shard,
    "bytes changed since they were indexed": replace_words,
    "bytes changed": replace_header,
    "image does not decode": corrupt_pixels_before_indexing,
}


@pytest.mark.parametrize("reason", FAULTS)
def test_bad_data_drops_its_own_segments_on_every_rank_and_says_so(demo, steps, tmp_path, reason):
    root = tmp_path / "demo"
    demo.copy(".", root)
    lost = FAULTS[reason](root)
    config, ranks = data_config(root), 2
    names = {source.name: number for number, source in enumerate(open_data(config, SEED).sources)}
    rows = {(source, key): (names[source], row) for source in SOURCES for row, key in enumerate(all_keys(root / source))}
    lost_rows = {rows[source, key] for source, _, key in lost}
    first = min(i for i, s in enumerate(steps) if lost_rows & {(g.source, g.sample) for g in segments([s])})
    length = 3 if len(lost) > 10 else len(steps) - first
    start = steps[first - 1].cursor if first else START
    parts = [[step for step, _ in zip(run(config, rank, ranks, start, first), range(length), strict=False)] for rank in range(ranks)]
    assert {len(part) for part in parts} == {min(length, len(steps) - first)}
    dropped = 0
    for expected, *found in zip(steps[first : first + length], *parts, strict=True):
        assert {(f.step, f.cursor, len(f.micro_batches)) for f in found} == {(expected.step, expected.cursor, 4)}
        all_segments = segments([expected])
        gone = Counter({s: n for s, n in all_segments.items() if (s.source, s.sample) in lost_rows})
        # bitwise: a segment is compared with all its ids, targets and pixels
        assert sum((segments([f]) for f in found), Counter()) == all_segments - gone
        entries = [entry for f in found for entry in f.bad]
        assert len(entries) == gone.total()
        for entry in entries:
            assert (entry.source, entry.shard, entry.key) in lost
            assert entry.reason.startswith(reason)
        at = {(e.source, e.shard, e.offset, e.size) for e in entries}
        assert at <= {(s, h, r["offset"], r["size"]) for s, h in {(s, h) for s, h, _ in lost} for r in rows_of(demo, s, h)}
        dropped += len(entries)
    assert dropped >= (len(lost) if len(lost) < 10 else 1)


def all_keys(source: Path) -> list[str]:
    return [key for sidecar in sorted(source.glob("*.index.parquet")) for key in read_index(sidecar).table["key"].to_pylist()]


def rows_of(demo, source: str, shard: str) -> list[dict]:
    return index_rows(demo.source(source) / shard)


def test_a_sample_that_is_not_as_long_as_planned_is_dropped(demo):
    """Whatever made it so: the pack has no room for more, and less would be other data."""
    config = data_config(demo.root)
    data = open_data(config, SEED)
    pieces = data.plan.global_batch(START).packs[0]
    for change in (-1, 1):
        altered = replace(pieces, tokens=pieces.tokens + np.where(np.arange(len(pieces)) == 1, change, 0))
        found = Materialiser(data.sources, data.tokenizer, config.images, SEED).segments(altered)
        assert [i for i, f in enumerate(found) if isinstance(f, BadEntry)] == [1]
        assert found[1].reason.startswith("sample changed since it was indexed")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_file_system_ends_the_life_and_drops_nothing(demo, monkeypatch, workers):
    monkeypatch.setattr("data_pipeline.loader.begin_worker", begin_failing)
    loader = run(data_config(demo.root, workers=workers))
    if not workers:
        monkeypatch.setattr(storage, "os", FailingReads())
    with pytest.raises(TryAgainError, match=r"train-00000\d\.tar: Connection timed out") as raised:
        next(loader)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"context": 5}, "do not hold an image"),
        ({"images_per_pack": 0}, "fits no pack"),
        ({"global_batch": 0}, "must be at least 1"),
        ({"micro_packs": 0}, r"data\.micro_packs is 0"),
        ({"workers": -1}, r"data\.workers is -1"),
        ({"workers": 1, "prefetch": 0}, r"data\.prefetch is 0"),
        ({"images": ImageConfig(size=0)}, r"data\.images\.size is 0"),
        ({"images": ImageConfig(tokens=0)}, r"data\.images\.tokens is 0"),
        ({"images": ImageConfig(crop=1.0)}, r"data\.images\.crop is 1\.0"),
        ({"images": ImageConfig(crop=-0.1)}, r"data\.images\.crop is -0\.1"),
        ({"images": ImageConfig(jitter=-0.1)}, r"data\.images\.jitter is -0\.1"),
        ({"images": ImageConfig(jitter=float("nan"))}, r"data\.images\.jitter is nan"),
    ],
)
def test_what_no_plan_can_hold_is_a_user_error(demo, changes, message):
    with pytest.raises(UserError, match=message):
        open_data(data_config(demo.root, **changes), SEED)


@pytest.mark.parametrize(
    ("unit", "at", "weights", "message"),
    [
        (MixUnit.samples, "half", {}, r"data\.phases\[0\]\.at: 'half' is not a number"),
        (MixUnit.samples, "0.5", {"txt": "1"}, r"data\.phases\[0\]\.weights: no source txt \(known: pairs, documents, text\)"),
        (MixUnit.samples, "0.5", {"text": "-1"}, r"data\.phases\[0\]\.weights\.text: -1 is negative"),
        (MixUnit.samples, "1.5", {"text": "2"}, "phases begin above 0 and below 1"),
        (MixUnit.epochs, "0.5", {"text": "2"}, "use samples or tokens"),
    ],
)
def test_a_phase_that_cannot_be_is_a_user_error(demo, unit, at, weights, message):
    with pytest.raises(UserError, match=message):
        open_data(data_config(demo.root, unit=unit, phases=[PhaseConfig(at, weights)]), SEED, steps=100)


def test_a_phase_changes_the_weights_it_names_and_leaves_the_others(demo):
    config = data_config(
        demo.root, unit=MixUnit.samples, window=60, phases=[PhaseConfig("0.25", {"text": "0"}), PhaseConfig("0.5", {"pairs": "3"})]
    )
    phases = open_data(config, SEED, steps=100).plan.phases
    assert [[str(w) for w in phase.weights] for phase in phases] == [["1", "1", "1"], ["1", "1", "0"], ["3", "1", "0"]]
    with pytest.raises(UserError, match=r"give train\.steps"):
        open_data(config, SEED)


@pytest.mark.parametrize("weight", ["much", "-1", "1/0"])
def test_a_weight_that_is_no_share_is_a_user_error(demo, weight):
    config = data_config(demo.root)
    config.sources["text"].weight = weight
    with pytest.raises(UserError, match=r"data\.sources\.text\.weight"):
        open_data(config, SEED)


@pytest.mark.parametrize("augmentation", [{"crop": 0.2}, {"jitter": 0.2}])
def test_any_whole_number_seeds_the_augmentation(demo, augmentation):
    config = data_config(demo.root, images=ImageConfig(size=32, tokens=4, **augmentation))
    data = open_data(config, -1)
    pixels = [Loader(config, data, seed, COSTS, 0, 1, START, 0) for seed in (-1, 2**64 - 1, 0)]
    first, again, other = ([m.batch.images for m in next(iter(loader)).micro_batches] for loader in pixels)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not all(a.equal(b) for a, b in zip(first, other, strict=True))


def test_the_seed_moves_samples_and_the_digest(demo):
    config = data_config(demo.root)
    plans = [open_data(config, seed).plan for seed in (1, 1, 2)]
    rows = [p.global_batch(START).packs[0].row.tolist() for p in plans]
    assert rows[0] == rows[1] != rows[2]
    assert plans[0].digest == plans[1].digest != plans[2].digest
