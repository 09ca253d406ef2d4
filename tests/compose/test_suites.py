"""Suites ask what they say, judge by what the data say, and put every figure beside what knowing nothing gives."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished_run import write_run
from safetensors.torch import load_file
from tars import make_conversation, make_document, make_image, write_tar

from compose import choices, places, prompts, suites
from compose.assistant import Assistant, Said, ask, load
from compose.cli import main
from compose.pictures import Picture
from data_pipeline.errors import UserError
from data_pipeline.samples import Kind, parse
from data_pipeline.text.templates import render, whole
from train.evaluate import Scorer, Scores
from train.generate import GREEDY, next_logits
from train.run_dir import RunDir
from train.weights import final
from train.weights.opened import open_model

CANDIDATES = ((["y"], 0), (["x"], 4), (["x"], -1), ({}, 0), (["y", "x"], 1))
COLOURS = ("red", "green", "blue", "white", "black", "orange", "gray", "purple")


@pytest.fixture(scope="module")
def assistant(run_dir) -> Assistant:
    return load(run_dir)


@pytest.fixture(scope="module")
def documents(demo, xc_data, tmp_path_factory) -> Path:
    """Eight pages: a figure with a caption behind the second line, and a bare one at the end."""
    folder = tmp_path_factory.mktemp("documents")
    members = []
    for number, colour in enumerate(COLOURS):
        figure = make_image(colour=colour)
        parts = [f"About {colour}", "first line", "second line", figure, f"All {colour}", "third line " * 60, make_image(20 + number)]
        members += make_document(f"page{number}", parts)
    write_tar(folder / "a.tar", members)
    assert xc_data("index", folder, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", folder) == 0
    return folder


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    return error


def test_both_layouts_are_read_and_the_likeliest_letter_is_judged(assistant, run_dir, tmp_path, capsys):
    (tmp_path / "red.png").write_bytes(make_image())
    mmbench = {
        "index": 7,
        "question": "What colour?",
        "hint": "Look.",
        "A": "red",
        "B": "blue",
        "C": None,
        "D": float("nan"),
        "answer": "A",
    }
    rows = [
        {**mmbench, "category": "colour", "image": base64.b64encode(make_image()).decode()},
        {**mmbench, "category": "colour", "image": "red.png", "answer": "B"},
        {**mmbench, "index": 8, "category": "again", "image": "7"},
        {**mmbench, "category": "other", "image": base64.b64encode(make_image(colour="blue")).decode()},
        {"question_id": "s1", "question_type_id": 3, "question": "Which?", "choice_a": "a", "choice_b": "b", "choice_c": "c"}
        | {"choice_d": "d", "answer": "D", "data_id": "red.png", "data_type": "image"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second, again, other, third = choices.read(file)
    assert other.parts[0].data == make_image(colour="blue"), "a row's own picture, whatever another row of its index shows"
    picture, words = first.parts
    assert (
        isinstance(picture, Picture) and picture.data == make_image() == second.parts[0].data == third.parts[0].data == again.parts[0].data
    )
    assert words == "Look.\nWhat colour?\nA. red\nB. blue\nAnswer with one letter."
    assert [(q.options, q.answer, q.category) for q in (first, second, third)] == [(2, 0, "colour"), (2, 1, "colour"), (4, 3, "3")]

    logits = next_logits(assistant.model, [assistant._prompt(ask(*first.parts))], assistant.tokenizer)[0]
    a, b = (float(logits[assistant.tokenizer.encode(letter)[0]]) for letter in "AB")
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(run_dir), "--suite", "choices", "--data", str(file), "-o", str(tmp_path / "out.json")])
    assert not ended.value.code
    said = capsys.readouterr().out
    table = json.loads((tmp_path / "out.json").read_text())["tables"][0]
    by_name = {row["figure"]: row for row in table["rows"]}
    assert by_name["colour"]["value"] == 0.5, "one question, asked with either answer"
    assert suites.run("choices", run_dir, file, None).tables[0].rows[0].value == by_name["all"]["value"]
    assert by_name["all"]["beside"] == pytest.approx((4 / 2 + 1 / 4) / 5)
    assert (a > b) == (assistant.likeliest(ask(*first.parts), "AB") == 0)
    assert said.startswith((tmp_path / "out.md").read_text())
    letters = "BA" if a > b else "AB"  # the one that the model rejects, and the one that it prefers
    for share, letter in enumerate(letters):
        file.write_text(json.dumps({**rows[0], "answer": letter}))
        assert suites.run("choices", run_dir, file, None).tables[0].rows[0].value == share
    assert "out.json exists" in refused(capsys, run_dir, "--suite", "choices", "--data", file, "-o", tmp_path / "out.json")


def test_a_question_that_does_not_fit_counts_as_wrong_and_is_said(run_dir, tmp_path):
    row = {"index": 1, "question": "Which?", "A": "a", "B": "b", "answer": "A"}
    file = tmp_path / "questions.jsonl"
    long = [{**row, "hint": "apple " * 17_000, "answer": answer} for answer in "AB"]
    file.write_text("\n".join(map(json.dumps, long)))
    (table,) = suites.run("choices", run_dir, file, None).tables
    assert table.rows[0].value == 0
    assert table.notes == ["2 questions do not fit the context of 512 tokens and count as wrong."]


def test_seed_bench_names_its_pictures_without_an_extension(run_dir, tmp_path, capsys):
    (tmp_path / "1454426_2591111986").write_bytes(make_image())
    row = {"question_id": "101669", "question_type_id": 1, "question": "Which?", "choice_a": "One", "choice_b": "Two", "choice_c": "Three"}
    row |= {"choice_d": "Four", "answer": "A", "data_type": "image", "segment": None}
    file = tmp_path / "seed.jsonl"
    file.write_text(json.dumps({**row, "data_id": "1454426_2591111986"}))
    (question,) = choices.read(file)
    assert question.parts[0].data == make_image()
    for wrong, said in (("1_2", r"no picture at .*/1_2: No such file"), (["a", "b"], r"line 1: its data_id, \['a', 'b'\], is no text")):
        file.write_text(json.dumps({**row, "data_id": wrong}))
        assert re.search(said, refused(capsys, run_dir, "--suite", "choices", "--data", file))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"answer": "C"}, "the answer 'C' is none of 2 options"),
        ({"question": None}, "it has no 'question'"),
        ({"image": "gone.png"}, "no picture at"),
        ({"image": "%%%"}, "neither base64 nor the name of a file"),
        ({"image": base64.b64encode(b"no picture").decode()}, "does not decode as a picture"),
        ({"data_type": "video"}, "it is about a video"),
        ({"image": 7}, "its image, 7, is no text"),
        ({"question": "half \ud83d"}, "half a surrogate pair"),
    ],
)
def test_a_line_that_is_no_question_is_named(run_dir, tmp_path, capsys, change, what):
    row = {"index": 1, "question": "q", "A": "a", "B": "b", "answer": "A", **change}
    file = tmp_path / "q.jsonl"
    file.write_text("\n" + json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    error = refused(capsys, run_dir, "--suite", "choices", "--data", file)
    assert what in error
    assert "line 2" in error or "gone.png" in error


def test_a_caption_finds_its_picture_among_those_of_its_candidates(demo, run_dir):
    opened = open_model(run_dir)
    scorer = Scorer(opened.model, opened.tokenizer, opened.config)
    folder = demo.source("heldout/unseen_concept/validation")
    items, pixels = scorer._read_split("x", folder)
    hits, guessed = scorer._pictures_of_captions(items, pixels)
    assert guessed == pytest.approx(0.1)
    for number in (0, 41):
        item = items[number]
        keys = [item["key"] if c == item["caption"] else next(i["key"] for i in items if i["caption"] == c) for c in item["candidates"]]
        nll = [scorer.score([scorer._segment(item["caption"], pixels[key])]).nll[0] for key in keys]
        assert len(keys) == 10
        assert hits[number] == (int(np.argmin(nll)) == item["answer"])
    opened.model.projector.linear_out.weight.data.zero_()
    blind, _ = scorer._pictures_of_captions(items, pixels)
    assert blind.tolist() == [item["answer"] == 0 for item in items], "nothing to see is no reason to be right"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"items": []}', '{"items": {}}', '{"items": [3]}', '{"items": [{"key": "a"}]}']
    + [json.dumps({"items": [{"key": "gone", "wrong_image": "b", "caption": "x", "candidates": c, "answer": a}]}) for c, a in CANDIDATES],
)
def test_candidates_that_are_none_are_refused_before_a_model_is_loaded(demo, tmp_path, capsys, content):
    folder = demo.copy("heldout/unseen_concept/validation", tmp_path / "captions")
    (folder / "candidates.json").write_text(content)
    error = refused(capsys, tmp_path / "no model", "--suite", "captions", "--data", folder)
    assert "candidates.json " + ("names b, which is not in" if content.endswith('"answer": 1}]}') else "is not laid out as") in error


def test_text_is_compared_with_what_the_stage_began_from_paragraph_by_paragraph(demo, tmp_path, capsys):
    base = write_run(demo, tmp_path / "base", "language")
    run = RunDir(write_run(demo, tmp_path / "pretrain", "pretrain"))
    settings = yaml.safe_load(run.config.read_text())
    settings["run"]["init_from"] = str(base)
    settings["evaluate"] = {"text": str(demo.source("heldout/text"))}
    run.config.write_text(yaml.safe_dump(settings))
    weights = load_file(run.final / final.MODEL_FILE)

    def measured() -> suites.Table:
        return suites.run("text", run.path, None, None).tables[0]

    for name in (n for n in weights if n.endswith("plora_b")):
        weights[name] = torch.full_like(weights[name], 0.1)
    final.write(run, weights, 2)
    kept = measured()
    assert kept.notes == ["Logits are the base model's to the last bit."]
    assert kept.rows[1].value == kept.rows[1].stderr == 0 and kept.rows[0].value == kept.rows[0].beside
    weights["decoder.norm.weight"] *= 1.1
    final.write(run, weights, 3)
    moved = measured()
    assert moved.notes == ["Logits differ from the base model's."]
    assert moved.rows[0].value - moved.rows[0].beside == pytest.approx(moved.rows[1].value)
    assert 0 < moved.rows[1].stderr < moved.rows[0].stderr, "by paragraph: far smaller than that of either loss"
    assert "names no held-out text (give --data FOLDER" in refused(capsys, base, "--suite", "text")
    assert "names no held-out pairs (give --data FOLDER" in refused(capsys, base, "--suite", "captions")
    assert "--base belongs to --suite text" in refused(capsys, base, "--suite", "captions", "--base", base)


def test_what_a_model_cannot_be_asked_is_refused_before_its_weights_are_looked_for(demo, documents, tmp_path, capsys):
    language = write_run(demo, tmp_path / "language", "language")
    shutil.rmtree(language / "final")
    (tmp_path / "red.png").write_bytes(make_image())
    asked = {"question": "What?", "A": "red", "B": "blue", "answer": "A"}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked | {"image": "red.png"}))
    assert "has seen no picture" in refused(capsys, language, "--suite", "choices", "--data", tmp_path / "q.jsonl")
    assert "has seen no picture" in refused(capsys, language, "--suite", "composition", "--data", documents)
    for suite, source in (("captions", "heldout/unseen_concept/validation"), ("text", "heldout/text")):
        folder = demo.copy(source, tmp_path / suite)
        facts = json.loads((folder / "source.json").read_text())
        (folder / "source.json").write_text(json.dumps({**facts, "tokenizer": "another"}))
        assert "was indexed with another tokenizer" in refused(capsys, language, "--suite", suite, "--data", folder)
    unended = write_run(demo, tmp_path / "unended", "language")
    shutil.rmtree(unended / "final")
    said = refused(capsys, language, "--suite", "text", "--data", demo.source("heldout/text"), "--base", unended)
    assert f"{unended} has no final weights" in said
    other = write_run(demo, tmp_path / "other", "language", tokenizer=str(shutil.copytree(demo.tokenizer, tmp_path / "tokenizer")))
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace(" ", "  ", 1))
    said = refused(capsys, language, "--suite", "text", "--data", demo.source("heldout/text"), "--base", other)
    assert "has another tokenizer: losses a token cannot be compared" in said


class Knowing(Assistant):
    """Answers as the author did, or never so."""

    def __init__(self, model: Assistant, right: bool, context: int = 4096) -> None:
        super().__init__(model.model, model.tokenizer, model.images, context, model.stage, model.weights)
        self.right = right

    def answer(self, turns, max_tokens, sampling=GREEDY) -> Said:
        assert self.length(turns) + max_tokens <= self.context
        return Said("<Seg1>, <Seg2>" if self.right else "<Seg0>", True)

    def likeliest(self, turns, options) -> int:
        asked = "".join(part for part in turns[0].parts if isinstance(part, str))
        own = make_image(colour=next(c for c in COLOURS if f'"All {c}"' in asked))
        shown = [part.data == own for part in turns[0].parts if isinstance(part, Picture)][-4:]
        assert sum(shown) == 1
        return shown.index(self.right)

    def score(self, segments) -> Scores:
        said = [self.tokenizer.decode(s.rendered.ids[s.rendered.supervised].tolist()) for s in segments]
        asked = [self.tokenizer.decode(s.rendered.ids[~s.rendered.supervised].tolist()) for s in segments]
        fits = [answer.split()[-1].removesuffix("</s>") in question for answer, question in zip(said, asked, strict=True)]
        return Scores(np.asarray([float(f != self.right) for f in fits]), np.ones(len(fits)))


@pytest.mark.parametrize(("right", "expected"), [(True, 1.0), (False, 0.0)])
def test_what_the_author_did_is_right(assistant, documents, right, expected):
    pages = places.read(documents)
    knowing = Knowing(assistant, right)
    found = places.measure(knowing, knowing, pages)
    assert len(found.lines) == len(found.captions.right) == len(found.pictures.right) == len(COLOURS)
    for figures in (found.lines, found.captions.right, found.pictures.right):
        assert np.mean(figures) == expected
    assert found.captions.pages == found.pictures.pages == [page.name for page in pages], "errors are those of pages"
    assert found.evenly.mean() == pytest.approx(0.5), "lines 0 and 2 of three"
    assert found.left_out == 0


def test_a_question_that_does_not_fit_is_counted_and_not_asked(assistant, documents):
    pages = places.read(documents)
    short = Knowing(assistant, True, context=90)
    found = places.measure(short, short, pages)
    assert (len(found.lines), len(found.captions.right), len(found.pictures.right), found.left_out) == (0, 8, 8, 8)
    longer = Knowing(assistant, True, context=150)
    assert places.measure(longer, longer, pages).left_out == 0, "of a long line a part is shown"
    assert longer.length(ask(*prompts.choose_lines(pages[0].lines, 2))) > 150


def test_pages_are_read_as_their_author_laid_them_out(documents):
    page = places.read(documents)[0]
    assert (page.title, len(page.lines), page.lines[1]) == ("About red", 3, "second line")
    assert {line: [p.caption for p in found] for line, found in page.figures.items()} == {1: ["All red"], 2: [None]}
    (place,) = places.places([page])
    assert [(placed.line, len(placed.pictures)) for placed in place.before()] == [("first line", 0), ("second line", 0)]


@pytest.mark.parametrize("alike", ["caption", "picture", "neither"])
def test_documents_that_leave_too_little_to_choose_among_are_refused(demo, xc_data, tmp_path, capsys, alike):
    """Four pages, two of them with the same caption or the same picture."""
    colours = ("red", "green", "blue", "blue" if alike == "picture" else "white")
    captions = ("All red", "All green", "All blue", "All blue" if alike == "caption" else "All white")
    pages = [
        [f"About {n}", "a line", make_image(colour=colour), words] for n, (colour, words) in enumerate(zip(colours, captions, strict=True))
    ]
    write_tar(tmp_path / "a.tar", [member for n, page in enumerate(pages) for member in make_document(f"page{n}", page)])
    assert xc_data("index", tmp_path, "--tokenizer", demo.tokenizer) == xc_data("merge", tmp_path) == 0
    capsys.readouterr()
    if alike == "neither":
        assert len(places.read(tmp_path)) == 4
    else:
        error = refused(capsys, tmp_path / "no model", "--suite", "composition", "--data", tmp_path)
        assert "too few documents have another picture with another caption than page" in error


def test_a_page_with_a_figure_that_does_not_decode_is_named_before_a_model_is_loaded(demo, xc_data, tmp_path, capsys):
    whole = [make_image(600, 400, colour) for colour in COLOURS[:5]]
    figures = [data[: len(data) // 2] if n == 2 else data for n, data in enumerate(whole)]  # its header is whole: the index takes it
    pages = [[f"About {n}", "a line", figure, f"All {n}"] for n, figure in enumerate(figures)]
    write_tar(tmp_path / "a.tar", [member for n, page in enumerate(pages) for member in make_document(f"page{n}", page)])
    assert xc_data("index", tmp_path, "--tokenizer", demo.tokenizer) == xc_data("merge", tmp_path) == 0
    capsys.readouterr()
    error = refused(capsys, tmp_path / "no model", "--suite", "composition", "--data", tmp_path)
    assert "page2 cannot be read" in error and error.count("\n") == 1


def test_an_answer_is_scored_where_training_supervises_it(assistant):
    members = dict(make_conversation("k", [("user", "<ImageHere>what is it?"), ("assistant", "red apple")], [make_image()]))
    elements = parse(Kind.conversation, {name.split(".", 1)[1]: data for name, data in members.items()})
    trained = render(elements, whole(elements), assistant.tokenizer, 1)
    asked = assistant.spoken(ask(Picture("p", make_image()), "what is it?"), "red apple").rendered
    assert asked.ids.tolist() == trained.ids.tolist()
    assert asked.supervised.tolist() == trained.supervised.tolist()


def test_composition_tables_say_how_much_was_asked(run_dir, documents, demo, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(run_dir), "--suite", "composition", "--data", str(documents)])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "| picture_of_4 | " in said and "| guessing | 8 |" in said and "| spread evenly | 8 |" in said
    assert "is a source of kind pair" in refused(capsys, run_dir, "--suite", "composition", "--data", demo.source("pairs"))
    with pytest.raises(UserError, match="needs documents"):
        suites.run("composition", run_dir, None, None)
