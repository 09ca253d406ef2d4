"""A run, its checkpoint and its export are one model: the same answers, token for token, and the same tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished_run import write_run
from PIL import Image

from compose.assistant import ask, load
from compose.cli import main
from compose.pictures import read
from data_pipeline.errors import UserError
from train.weights import exported
from train.weights.export import export
from train.weights.opened import open_model


@pytest.fixture(scope="module")
def run_dir(demo, tmp_path_factory) -> Path:
    """With a tower that has official names; the position table is not that of its architecture's own size."""
    return write_run(demo, tmp_path_factory.mktemp("run") / "sft", images={"size": 28, "tokens": 1}, vision=CLIP)


CLIP = {
    "name": "vit_large_patch14_clip_quickgelu_336",
    "patch": 14,
    "block": -1,
    "overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "mine"
    export(run_dir, out)
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "apple.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def test_an_export_answers_as_its_run_does_token_for_token(run_dir, folder, picture):
    ours, theirs = load(run_dir), load(folder)
    for parts in (["what is this?", *read([picture])], ["write about rain"]):
        prompts = [a._prompt(ask(*parts)) for a in (ours, theirs)]
        assert all(np.array_equal(p.rendered.ids, prompts[0].rendered.ids) for p in prompts)
        said = [a.answer(ask(*parts), 24) for a in (ours, theirs)]
        assert said[0] == said[1] and said[0].text
    assert theirs.context == ours.context and theirs.stage is ours.stage
    states = [dict(open_model(path).model.named_parameters()) for path in (run_dir, folder)]
    assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())


def test_commands_take_an_export_without_the_run_that_made_it(demo, run_dir, folder, picture, tmp_path, capsys):
    def said(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        found = capsys.readouterr()
        assert not ended.value.code, found.err
        return found.out

    line = f"what is {picture}"
    assert said("chat", folder, "--ask", line, "--max-tokens", 12) == said("chat", run_dir, "--ask", line, "--max-tokens", 12)
    captions = demo.copy("heldout/unseen_concept/validation", tmp_path / "captions")
    items = json.loads((captions / "candidates.json").read_text())["items"]
    (captions / "candidates.json").write_text(json.dumps({"items": items[:24]}))
    tables = [said("eval", path, "--suite", "captions", "--data", captions).split("\n", 1)[1] for path in (run_dir, folder)]
    assert tables[0] == tables[1] and "| picture_of_10 | " in tables[0]
    articles = []
    for name, path in (("ours", run_dir), ("theirs", folder)):
        said("article", path, "--instruction", "rain", "--images", picture, "--max-tokens", 40, "-o", tmp_path / f"{name}.html")
        articles.append((tmp_path / f"{name}.json").read_text().split('"steps"')[1])
    assert articles[0] == articles[1]
    assert str(run_dir) not in (folder / exported.FILE).read_text()


def test_what_no_export_says_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"no run directory and no export: neither config\.yaml nor stage\.yaml in it"):
        open_model(tmp_path)
    stage = yaml.safe_load((folder / exported.FILE).read_text())
    for key, value in (("name", "hf-hub:someone/model"), ("overrides", {"checkpoint_path": "elsewhere.pt"})):
        changed = {**stage, "model": {**stage["model"], "vision": {**stage["model"]["vision"], key: value}}}
        (tmp_path / exported.FILE).write_text(yaml.safe_dump(changed))
        with pytest.raises(UserError, match="names other weights than those of the folder"):
            open_model(tmp_path)
    (tmp_path / exported.FILE).write_text("run: {name: x, stage: sft}\ndata: {context: 9, path: /tmp}\n")
    with pytest.raises(UserError, match=r"unknown key data\.path"):
        open_model(tmp_path)
