"""`xc-data` as a user meets it: help for each command, one line and exit code 2 for each mistake, a page that needs no network."""

import base64
import html
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import psutil
import pytest
from demo_data import START, segments_of
from PIL import Image
from stage_yaml import write_stage
from tars import make_image, make_pairs, overwrite, write_tar

from data_pipeline.configure import load_data_view
from data_pipeline.opened import open_data
from data_pipeline.read import remote as remote_module
from data_pipeline.read.materialise import Materialiser
from data_pipeline.read.storage import ShardReader
from data_pipeline.shards import index as index_module
from data_pipeline.shards.merge import merge
from data_pipeline.shards.source import ShardSource

COMMANDS = ("index", "merge", "stats", "verify", "select", "ledger", "preview", "replay", "simulate", "import")


@pytest.fixture
def config(demo, tmp_path) -> Path:
    """A stage's YAML over the demo."""
    return write_stage(tmp_path / "demo.yaml", demo)


@pytest.fixture
def mistake(xc_data, capsys):
    """Runs a command that must fail by the user's mistake; returns its one line."""

    def run(*arguments: object) -> str:
        assert xc_data(*arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_says_what_it_does(xc_data, capsys, command):
    assert xc_data(command, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: xc-data {command}")
    assert len(out.splitlines()) > 8


def test_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "data_pipeline.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_a_mistake_is_one_line_and_exit_code_2_in_a_process_of_its_own(demo, tmp_path):
    command = [sys.executable, "-m", "data_pipeline.cli", "index", str(tmp_path / "nowhere"), "--tokenizer", str(demo.tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no such shard folder: {tmp_path / 'nowhere'} (give the folder that holds the .tar shards)\n"


def test_a_folder_without_shards_is_a_mistake(demo, tmp_path, mistake):
    assert "no .tar shard in" in mistake("index", tmp_path, "--tokenizer", demo.tokenizer)
    assert "no .tar shard in" in mistake("merge", tmp_path)


def test_a_source_that_is_not_indexed_names_the_commands(tmp_path, mistake):
    write_tar(tmp_path / "a.tar", make_pairs(1))
    assert "xc-data index" in mistake("merge", tmp_path)
    assert re.search(r"xc-data index .*then xc-data merge", mistake("stats", tmp_path))


def test_shards_without_a_usable_sample_are_a_mistake(demo, tmp_path, mistake):
    write_tar(tmp_path / "a.tar", [("k.mp3", b"sound")])
    assert "no usable sample" in mistake("index", tmp_path, "--tokenizer", demo.tokenizer)


def test_a_tokenizer_that_is_not_there_is_a_mistake(demo, tmp_path, mistake):
    assert "tokenizer.json" in mistake("index", demo.source("text"), "--tokenizer", tmp_path)


@pytest.mark.parametrize("task", ["2/2", "x", "1", "-1/2", "1/0", "/", "²/3"])
def test_a_bad_task_is_a_mistake(demo, mistake, task):
    assert "--task" in mistake("index", demo.source("text"), "--tokenizer", demo.tokenizer, f"--task={task}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.contxt=512", r"unknown key data\.contxt \(did you mean context\?\)"),
        ("data.images.sise=64", r"unknown key data\.images\.sise \(did you mean size\?\)"),
        ("data.sources.pairs.wieght=2", r"unknown key data\.sources\.pairs\.wieght \(did you mean weight\?\)"),
        ("data.context=large", r"data\.context: .*large"),
        ("data.unit=bytes", r"data\.unit: .*bytes"),
        ("data.images=7", r"data\.images is a section, not 7"),
        ("data.sources.pairs=2", r"data\.sources\.pairs is a section, not 2"),
        ("data.context", r"is not key=value"),
        ("data.context=[", r"override 'data\.context=\['"),
        ("data.sources.text.weight=often", r"data\.sources\.text\.weight: 'often' is not a number"),
        ("data.sources.text.path=/nowhere", r"data\.sources\.text\.path: no such shard folder"),
        ("data.context=5", r"data\.context: 5 tokens do not hold an image"),
        ("data.global_batch=0", r"must be at least 1"),
        ("data.tokenizer=/nowhere", r"/nowhere/tokenizer\.json"),
    ],
)
def test_a_mistake_in_the_config_names_key_and_cure(config, tmp_path, mistake, override, message):
    assert re.search(message, mistake("preview", config, override, "-o", tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {context: 1", "is not YAML"),
        ("- a list", "is not a mapping"),
        ("run: {seed: 1}", "data.tokenizer"),
        ("data: {tokenizer: T}\n", "global_batch"),
        ("data: 3", "data is a section, not 3"),
        ("base: other.yaml", "no such config: .*other.yaml"),
        ("base: own.yaml", "leads back to itself"),
        ("", "data.tokenizer"),
    ],
)
def test_a_config_that_is_not_one_is_a_mistake(tmp_path, mistake, content, message):
    (tmp_path / "own.yaml").write_text(content)
    assert re.search(message, mistake("preview", tmp_path / "own.yaml", "-o", tmp_path / "page.html"))


def test_a_config_that_is_not_there_is_a_mistake(tmp_path, mistake):
    assert "no such config" in mistake("preview", tmp_path / "none.yaml")


def test_a_page_that_cannot_be_written_is_a_mistake(config, tmp_path, mistake):
    for folder in (tmp_path / "no", config):  # which is a file
        assert "cannot write" in mistake("preview", config, "--packs", 1, "-o", folder / "page.html")
    assert "--packs 0" in mistake("preview", config, "--packs", 0, "-o", tmp_path / "page.html")


def test_index_dir_keeps_a_read_only_folder_clean(demo, tmp_path, xc_data, capsys):
    before = sorted(demo.source("pairs").iterdir())
    index = tmp_path / "index"
    assert xc_data("index", demo.source("pairs"), "--tokenizer", demo.tokenizer, "--index-dir", index) == 0
    assert xc_data("merge", demo.source("pairs"), "--index-dir", index) == 0
    assert xc_data("stats", demo.source("pairs"), "--index-dir", index) == 0
    assert sorted(demo.source("pairs").iterdir()) == before
    assert "2,138" in capsys.readouterr().out


def test_stats_show_what_the_index_counted(demo, xc_data, capsys):
    assert xc_data("stats", demo.source("pairs"), demo.source("documents"), demo.source("text")) == 0
    out = capsys.readouterr().out
    assert re.search(r"samples kept +2,138 +of 2,138; 0\.00% left out", out)
    assert re.search(r"images +175 +a sample: median 1, p99 \d+, max 10", out)
    assert re.search(r"image size +72 x 72", out)
    assert re.search(r"text tokens +25,806", out)
    assert "images a document" in out
    assert re.search(r"\n +1 +58 +[█#]{40} ", out), "the longest bar"


def test_stats_of_several_sources_end_with_a_table_of_all(demo, tmp_path, xc_data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_tar(tmp_path / "damaged" / "a.tar", [*make_pairs(3), ("bad.png", make_image()), ("bad.txt", b"\xff")])
    assert xc_data("index", tmp_path / "damaged", "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", tmp_path / "damaged") == 0
    assert xc_data("stats", demo.source("text"), tmp_path / "damaged") == 0
    together = capsys.readouterr().out.partition("together")[2]
    tokens = merge(tmp_path / "damaged", tmp_path / "damaged").text_tokens
    assert re.search(r"/text +2,492 +0\.00% +25,806 +100\.0% +10\.4 +0 *\n", together)
    assert re.search(rf"/damaged +3 +25\.00% +{tokens} +0\.0% +3\.0 +3 *\n", together)
    assert re.search(rf"all +2,495 +0\.04% +{25806 + tokens:,} +100\.0% ", together)


@pytest.mark.parametrize("name", ["plot.svg", "plot.html"])
def test_a_plot_of_stats_is_one_file_that_holds_every_count(demo, tmp_path, xc_data, name):
    assert xc_data("stats", demo.source("documents"), demo.source("pairs"), "--plot", tmp_path / name) == 0
    text = (tmp_path / name).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|src=|href=|<script", text)
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    counts = [int(t.text.rpartition(": ")[2].replace(",", "")) for t in svg.iter("{http://www.w3.org/2000/svg}title")]
    documents, pairs = (ShardSource("s", demo.source(n)).facts for n in ("documents", "pairs"))
    assert sum(counts) == 2 * documents.kept + 2 * documents.images + pairs.kept + 2 * pairs.images


def test_a_plot_of_another_kind_is_a_mistake(demo, tmp_path, mistake):
    assert ".svg" in mistake("stats", demo.source("text"), "--plot", tmp_path / "plot.png")


def test_stats_name_the_damage(demo, tmp_path, xc_data, capsys):
    members = [*make_pairs(3), ("bad[red].png", make_image()), ("bad[red].txt", b"\xff")]
    write_tar(tmp_path / "a.tar", members)
    assert xc_data("index", tmp_path, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", tmp_path) == 0
    assert "left out: 1 x text is not UTF-8" in capsys.readouterr().out
    assert xc_data("stats", tmp_path) == 0
    out = capsys.readouterr().out
    assert "25.00% left out" in out
    assert "text is not UTF-8" in out
    assert "a.tar bad[red]" in out


def test_preview_shows_each_segment_as_the_batch_holds_it_and_loads_nothing(config, tmp_path, xc_data):
    page = tmp_path / "page.html"
    assert xc_data("preview", config, "data.context=128", "--packs", 3, "-o", page) == 0
    text = page.read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|href=\"(?!#)|@import|url\(", text)
    view = load_data_view(config, ["data.context=128"])
    data = open_data(view.data, view.run.seed)
    materialiser = Materialiser(data.sources, data.tokenizer, view.data.images, view.run.seed)
    cards = re.findall(r"<article.*?</article>", text, re.DOTALL)
    for pack in data.plan.global_batch(START).packs[:3]:
        batch, _ = materialiser.batch([pack])
        pictures = iter(batch.images.numpy())
        for segment in segments_of(batch):
            card, cards = cards[0], cards[1:]
            assert f"<code>{data.sources[segment.source].key(segment.sample)}</code>" in card
            words = [data.tokenizer.decode([i]) for i in segment.ids if i not in data.tokenizer.special]
            shown = re.findall(r'<span class="(seen|text)">(.*?)</span>', card, re.DOTALL)
            # image positions hold an id that is not shown
            images = card.count("[image: 4 tokens]")
            assert html.unescape(" ".join(t for _, t in shown)).split() == " ".join(words).split()
            assert {c for c, _ in shown} <= {"seen"}, "every word of a plain sample is predicted"
            assert images == len(segment.image_positions) / 4
            for uri in re.findall(r"data:image/webp;base64,([^\"]+)", card):
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB"))
                assert (pixels.transpose(2, 0, 1) == next(pictures)).all()
    assert cards == []


def test_preview_shows_data_as_text_and_says_what_was_dropped(demo, tmp_path, xc_data):
    hostile = '<script>alert("x")</script> <img src=x onerror=alert(1)> </s>'
    source = tmp_path / "source"
    write_tar(source / "a.tar", [*make_pairs(2), ("h<b>i.png", make_image()), ("h<b>i.txt", hostile.encode())])
    assert xc_data("index", source, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", source) == 0
    shard = source / "a.tar"
    overwrite(shard, shard.read_bytes().index(b"red apple 1"), b"R")
    config = write_stage(tmp_path / "c.yaml", demo, sources={"s": {"path": str(source)}}, global_batch=1)
    assert xc_data("preview", config, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "h&lt;b&gt;i" in page
    assert "<b>i" not in page
    assert page.count("<script") == 1
    assert "onerror=" not in re.sub(r">[^<]*<", "><", page)
    assert "dropped: bytes changed since they were indexed" in page


@pytest.mark.parametrize("command", ["index", "verify"])
def test_a_worker_that_dies_names_what_is_not_done_and_one_process_does_it(demo, tmp_path, xc_data, capsys, monkeypatch, command):
    folder = tmp_path / "shards"
    for name in "abcdefgh":
        write_tar(folder / f"{name}.tar", make_pairs(2))
    index = ("index", folder, "--tokenizer", demo.tokenizer, "--kind", "pair")
    if command == "verify":
        assert xc_data(*index) == 0
        assert xc_data("merge", folder) == 0
    real, read = index_module.walk_file, ShardReader.read

    def deadly_walk(file, size):
        if file.name.endswith("b.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, size)

    def deadly_read(reader, location):
        if location.shard.name == "b.tar":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(reader, location)

    started = index if command == "index" else ("verify", folder)
    with monkeypatch.context() as patch:  # inherited by the workers, which are forked: also where this process has read remote shards
        patch.setattr(remote_module, "_opened_by", [])
        patch.setattr(index_module, "walk_file", deadly_walk)
        patch.setattr(ShardReader, "read", deadly_read)
        capsys.readouterr()
        assert xc_data(*started, "--workers", 2) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: a worker died; [1-8] of 8 shards are not done: (?=.*b\.tar).*\(.*run the same with --workers 1\)$", line)
    assert xc_data(*started, "--workers", 1) == 0


SLOW = """
import os, sys, time
from data_pipeline.cli import main
from data_pipeline.shards import index

def walk_file(*_):
    os.write(1, b"walking\\n")
    time.sleep(60)

index.walk_file = walk_file
main(sys.argv[1:])
"""


def catches_sigint(pid: int) -> bool:
    """Whether a process has a handler of its own, as Python has until a worker begins."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


def test_control_c_ends_an_index_and_its_workers_busy_or_not_with_one_line(demo, tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", make_pairs(2))
    command = [sys.executable, "-c", SLOW, "index", str(tmp_path), "--tokenizer", str(demo.tokenizer), "--kind", "pair", "--workers", "6"]
    process = subprocess.Popen(command, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "walking\n"
    while len(ready := [worker.pid for worker in psutil.Process(process.pid).children() if not catches_sigint(worker.pid)]) < 6:
        time.sleep(0.01)
        assert process.poll() is None, ready
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert (errors, process.returncode) == ("interrupted\n", -signal.SIGINT), "a shell's loop ends with it"
