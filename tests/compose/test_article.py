"""The five steps: answers are read strictly, what replaces them is recorded, and the page is one that a person can read."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Page, browser
from finished_run import write_run
from PIL import Image

from compose import prompts
from compose.article import SHORT_ANSWER, Article, ask_for_lines, compose
from compose.assistant import Assistant, Said, Turn, ask, load
from compose.cli import main
from compose.collection import Collection, build
from compose.page import check_output, write
from compose.prompts import Read
from train.generate import GREEDY, Sampling

TEXT = "# Fruit & <b>sun</b>\n\nApples ripen in the sun.\nBirds like them too.\nIn winter there are none.\nThen we eat \u201cjam\u201d."


class Scripted(Assistant):
    """A model whose answers are given; what it is asked is laid out and measured as ever."""

    def __init__(self, model: Assistant, answers: list[str | Said], context: int = 4096) -> None:
        super().__init__(model.model, model.tokenizer, model.images, context, model.stage, model.weights)
        self.answers = answers

    def answer(self, turns: list[Turn], max_tokens: int, sampling: Sampling = GREEDY) -> Said:
        assert self.length(turns) <= self.context
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Said) else Said(answer, True)


@pytest.fixture(scope="module")
def assistant(run_dir) -> Assistant:
    return load(run_dir)


@pytest.fixture(scope="module")
def emoji(collection) -> Collection:
    return Collection(collection)


def composed(assistant: Assistant, emoji: Collection, answers: list[str], context: int = 4096, most: int = 3) -> Article:
    scripted = Scripted(assistant, answers, context)
    article = compose(scripted, "Write about fruit", [], lambda text, used: emoji.retrieve(text, 4, used), most, 100, GREEDY)
    assert not scripted.answers
    return article


def test_a_model_that_answers_as_asked_is_taken_at_its_word(assistant, emoji):
    article = composed(assistant, emoji, [TEXT, "<Seg0>, <Seg2>", "A red apple", "B", "Snow on a mountain.", "D."])
    assert article.title == "Fruit & <b>sun</b>"
    assert len(article.lines) == 4
    assert [s.step for s in article.steps] == ["write", "choose lines", *["caption", "retrieve", "choose"] * 2]
    assert not any(s.fallback for s in article.steps)
    first, second = article.steps[4], article.steps[7]
    assert article.pictures == {0: (first.candidates[1], "A red apple"), 2: (second.candidates[3], "Snow on a mountain.")}
    assert len(first.candidates) == len(second.candidates) == 4
    assert first.candidates[1].digest not in {c.digest for c in second.candidates}, "a picture is used once"
    assert first.candidates[1].name in second.prompt, "the choice is made with the pictures so far in view"
    assert "[picture: A red apple]" in article.steps[5].prompt
    assert "In winter" not in article.steps[3].prompt, "a caption sees the text so far"


def test_answers_that_do_not_fit_are_replaced_and_said(assistant, emoji):
    article = composed(assistant, emoji, ["One sentence. Another one! A third?", "after the first", "", "the second", "a\nb", "B"], most=2)
    assert article.lines == ["One sentence.", "Another one!", "A third?"]
    fallbacks = [(s.step, s.fallback) for s in article.steps if s.fallback]
    assert fallbacks == [
        ("write", "written as one line; split into sentences, titled by the instruction"),
        ("choose lines", "no valid mark; spread evenly over the lines"),
        ("caption", "nothing was written; took the line before it"),
        ("choose", "no letter alone; took the option whose letter was likeliest to begin the answer"),
        ("caption", "more than one short line; took the beginning of the first"),
    ]
    assert sorted(article.pictures) == [0, 2]


def test_a_short_context_loses_lines_then_candidates_and_never_the_article(assistant, emoji):
    long = "Title\n" + "\n".join(f"line {i} " + "word " * 30 for i in range(8))
    article = composed(assistant, emoji, [long, "<Seg7>", "An apple", "C"], context=200)
    assert article.steps[1].prompt.count("word ") < 8 * 30, "lines are shown as far as they fit"
    assert "line 7" in article.steps[2].prompt
    assert "line 0 " not in article.steps[2].prompt
    assert article.pictures[7][0] == article.steps[4].candidates[2]
    tiny = composed(assistant, emoji, ["Title\n" + "word " * 200], context=60, most=1)
    assert [s.fallback for s in tiny.steps[1:]] == [
        "the lines do not fit the model's context; spread evenly over the lines",
        "the line does not fit the model's context; took the line itself",
        None,
        "two pictures do not fit the model's context; took the nearest by caption",
    ]
    assert tiny.pictures[0][0] == tiny.steps[3].candidates[0]


def test_a_search_that_finds_nothing_leaves_the_line_bare_and_is_said_in_record_and_page(assistant, tmp_path):
    scripted, told = Scripted(assistant, [TEXT, "<Seg0>", "A red apple"]), []
    article = compose(scripted, "Write about fruit", [], lambda text, used: [], 3, 100, GREEDY, told.append)
    assert not article.pictures
    assert told == ["writing, 100 tokens at most", "choosing places for pictures in 4 paragraphs", "picture 1 of 1: A red apple"]
    assert [s.step for s in article.steps if s.fallback] == ["retrieve"]
    write(article, {"checkpoint": "runs/x", "stage": "sft", "collection": None}, tmp_path / "a.html", tmp_path / "a.json")
    said = "found none that is still there and not used yet; left the line without a picture"
    assert json.loads((tmp_path / "a.json").read_text())["steps"][-1]["fallback"] == said
    assert said in (tmp_path / "a.html").read_text()


TOOK = "not marks alone, or lines that are not there, or too many; took the first 3 valid marks"


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("<Seg1>, <Seg3>", [1, 3]),
        ("<Seg3> <Seg1>.", [1, 3]),
        ("none", []),
        ("None.", []),
        ("After <Seg2>", Read([2], TOOK)),
        ("<Seg9>", Read([0, 2, 4], "no valid mark; spread evenly over the lines")),
        ("<Seg0>, <Seg1>, <Seg2>, <Seg3>", Read([0, 1, 2], TOOK)),
        ("", Read([0, 2, 4], "no valid mark; spread evenly over the lines")),
        (Said("<Seg1>, <Seg3>", False), Read([1, 3], "cut off at the limit of its length; took the first 3 valid marks")),
    ],
)  # fmt: skip
def test_marks_are_read_strictly(answer, read):
    said = answer if isinstance(answer, Said) else Said(answer, True)
    assert prompts.read_lines(said.text, 5, 3, said.whole) == (read if isinstance(read, Read) else Read(read))


@pytest.mark.parametrize(("answer", "value"), [("A", 0), ("d.", 3), ("E", None), ("A or B", None), ("", None), ("Apple", None)])
def test_letters_are_read_strictly(answer, value):
    assert prompts.read_choice(answer, 4).value == value
    assert (prompts.read_choice(answer, 4).fallback is None) == (value is not None)


def test_answers_that_the_limit_cut_off_are_said(assistant, emoji):
    article = composed(assistant, emoji, [TEXT, Said("<Seg0>, <Seg2>", False), Said("A red", False), "B", "Snow.", "D."])
    assert [s.step for s in article.steps if s.fallback and "cut off at the limit" in s.fallback] == ["choose lines", "caption"]
    assert [caption for _, caption in article.pictures.values()] == ["A red", "Snow."]
    assert prompts.read_caption("A red", "x", whole=False) == Read("A red", "cut off at the limit of its length")
    assert prompts.read_caption("A red apple", "x", whole=True) == Read("A red apple")


def test_an_answer_with_many_marks_has_room_for_them(assistant):
    lines, asked = [f"line {i}" for i in range(24)], []

    class Marking(Scripted):
        def answer(self, turns, max_tokens, sampling=GREEDY):
            asked.append(max_tokens)
            return super().answer(turns, max_tokens, sampling)

    marks = ", ".join(f"<Seg{i}>" for i in range(20))
    *_, read = ask_for_lines(Marking(assistant, [marks]), lines, 20)
    assert read == Read(list(range(20))) and asked[0] >= len(assistant.tokenizer.encode(marks))
    ask_for_lines(Marking(assistant, ["none"]), lines, 2)
    assert asked[1] == SHORT_ANSWER
    least = assistant.length(ask(*prompts.choose_lines(lines, 20, 5)))
    *_, read = ask_for_lines(Marking(assistant, [marks], least + SHORT_ANSWER), lines, 20)
    assert read.fallback is None, "asked, though there is less room"
    assert ask_for_lines(Marking(assistant, [], least + SHORT_ANSWER - 1), lines, 20) is None


def test_a_text_without_blanks_is_no_title_and_is_shown_cut():
    line = "苹果在阳光下成熟。" * 20
    value, fallback = prompts.read_article(f"{line}\n{line}好", "写一个故事", whole=True)
    assert value == ("写一个故事", [line, f"{line}好"]) and "too long for a title" in fallback
    assert prompts.read_article(f"{line}\n{line}好", line).value.title == line[:120] + " …"
    assert len(prompts.as_words(prompts.choose_lines([line], 1))) > len(line)
    assert len(prompts.as_words(prompts.choose_lines([line], 1, 5))) < len(line)
    words = "photograph " * 9
    assert "photograph photograph\n" in prompts.as_words(prompts.choose_lines([words], 1, 2)), "words are not cut"


def test_a_broken_last_sentence_is_left_out():
    value, fallback = prompts.read_article("Title\nA whole one. And a bro", "x", whole=False)
    assert value == ("Title", ["A whole one."])
    assert "broken sentence left out" in fallback
    for cut, left in {
        "T\nOne.\nTwo. And a bro": ("T", ["One.", "Two."]),
        "T\nOne\nA bro": ("T", ["One"]),
        "标题\n第一段。\n第二段。第三句": ("标题", ["第一段。", "第二段。"]),
        "14.3. Fractal Explorer\nThis filter ren": ("14.3. Fractal Explorer", ["This filter ren"]),
    }.items():
        assert prompts.read_article(cut, "x", whole=False).value == left
    assert prompts.read_article("", "Say it", whole=True).value == ("Say it", ["Say it"])
    assert prompts.read_article("T\na\na\nb", "x").value.lines == ["a", "b"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(assistant, emoji, tmp_path_factory) -> Path:
    article = composed(assistant, emoji, [TEXT, "<Seg0>, <Seg2>", "A red apple", "B", "</figcaption><script>x</script>", "perhaps D"])
    output = tmp_path_factory.mktemp("article") / "article.html"
    facts = {"checkpoint": "runs/x", "stage": "compose", "collection": "emoji"}
    write(article, facts, output, check_output(output))
    return output


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_shows_text_and_pictures_and_asks_nobody(page, written, width):
    page.open(written, width)
    assert page.requests == [written.resolve().as_uri()] * len(page.requests)
    assert not page.errors
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("[...document.images].length") == 2 + 8
    assert page.run(
        "Promise.all([...document.images].map(i => i.decode())).then(() => [...document.images].every(i => i.naturalWidth > 1))"
    )
    assert page.run("document.querySelector('h1').textContent") == "Fruit & <b>sun</b>"
    assert page.run("[...document.querySelectorAll('article > *')].map(e => e.tagName).join(' ')") == "P FIGURE P P FIGURE P"
    assert page.run("document.scripts.length") == 0, "words are text, whatever is in them"
    assert page.run("document.querySelectorAll('.chosen').length") == 2
    size = page.run("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)")
    assert size >= 16
    assert page.run("document.querySelector('article p').offsetWidth") / size < 45, "lines that an eye can follow"
    page.run("document.querySelector('details').open = true")
    assert page.run("document.documentElement.scrollWidth") <= width, "with all questions shown"
    assert page.run("[...document.querySelectorAll('.step')].length") == 6
    outside = "e => e.getBoundingClientRect().right > innerWidth || e.getBoundingClientRect().width < 1"
    assert page.run(f"[...document.querySelectorAll('.step, .step pre, .shown > div, .shown img')].filter({outside}).length") == 0
    columns = page.run("[...document.querySelectorAll('.shown')].map(e => getComputedStyle(e).gridTemplateColumns.split(' ').length)")
    assert columns == [2 if width == 400 else 4] * 2, "pictures that an eye can compare"
    assert page.run("Math.min(...[...document.querySelectorAll('.shown img')].map(e => e.offsetWidth))") >= 100
    assert page.run("Math.min(...[...document.querySelectorAll('.step pre')].map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12
    assert "1 with a remark" in page.run("document.querySelector('summary').textContent")


def test_the_record_holds_every_question_and_its_answer(written):
    record = json.loads(written.with_suffix(".json").read_text())
    assert [s["step"] for s in record["steps"]] == ["write", "choose lines", *["caption", "retrieve", "choose"] * 2]
    assert record["steps"][-1]["answer"] == "perhaps D"
    assert "likeliest" in record["steps"][-1]["fallback"]
    assert record["steps"][1]["prompt"].startswith("<Seg0> Apples")
    assert [p["after_line"] for p in record["article"]["pictures"]] == [0, 2]
    assert record["made_with"]["stage"] == "compose"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["article", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.err if ended.value.code else said.out


def test_a_model_that_learnt_nothing_still_gives_a_page_with_ones_own_pictures(run_dir, tmp_path, capsys):
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    images = [tmp_path / f"{i}.png" for i in range(3)]
    common = [run_dir, "--instruction", "food fruit", "--max-tokens", 30, "--images", *images, "-o"]
    code, said = run(capsys, *common, tmp_path / "a.html")
    assert code == 0, said
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["article"]["lines"]
    placed = {p["name"] for p in record["article"]["pictures"]}
    assert placed and placed <= {i.name for i in images}
    assert record["steps"][0]["prompt"].startswith("<picture: 0.png><picture: 1.png><picture: 2.png>food fruit")
    assert run(capsys, *common, tmp_path / "b.html")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text()) == record, "the same seed, the same article"


def test_an_article_takes_its_pictures_from_a_collection(run_dir, collection, tmp_path, capsys):
    common = [run_dir, "--instruction", "food fruit", "--collection", collection, "--pictures", 2, "--max-tokens", 30]
    code, said = run(capsys, *common, "-o", tmp_path / "a.html")
    assert code == 0, said
    assert f"open {tmp_path / 'a.html'}" in said
    assert "paragraphs, " in said.splitlines()[0], "progress goes to stderr: a reader who leaves ends no article"
    record = json.loads((tmp_path / "a.json").read_text())
    retrieved = [step for step in record["steps"] if step["step"] == "retrieve"]
    placed = record["article"]["pictures"]
    assert 1 <= len(placed) == len(retrieved) <= 2
    known = {(e.name, e.caption) for e in Collection(collection).search("fruit", 200)}
    for step, picture in zip(retrieved, placed, strict=True):
        assert {(c["name"], c["known_as"]) for c in step["candidates"]} <= known and step["used"] == 4
        assert picture["sha256"] in {c["sha256"] for c in step["candidates"]}
    assert len({p["sha256"] for p in placed}) == len(placed)
    assert record["made_with"]["collection"] == str(collection)
    assert (tmp_path / "a.html").read_text().count("<figure>") == len(placed)


def test_what_cannot_be_written_is_refused_in_one_line_and_leaves_nothing(demo, run_dir, collection, tmp_path, capsys):
    def refused(*arguments: object, instruction: str = "x", model: Path = run_dir) -> str:
        code, said = run(capsys, model, "--instruction", instruction, *arguments)
        assert code == 2
        assert said.count("\n") == 1
        assert len(said) < 400
        return said

    out = ["-o", tmp_path / "a.html"]
    for stage, what in (("pretrain", "not trained to follow instructions"), ("sft", "tokens of prompt are too many")):
        unread = write_run(demo, tmp_path / stage, stage)
        shutil.rmtree(unread / "final")  # found before weights are looked for
        assert what in refused(*out, model=unread, instruction="apple " * 17_000)
        shutil.rmtree(unread)
    assert "--instruction is empty" in refused(*out, instruction=" ")
    assert "no picture at" in refused(*out, "--images", "gone.png")
    assert "is no collection" in refused(*out, "--collection", tmp_path)
    assert "is no run directory" in refused(*out, model=tmp_path)
    assert "no folder" in refused("-o", tmp_path / "no" / "a.html")
    assert "is a folder (give the page's name" in refused("-o", "/")
    assert "cannot write /proc/a.html" in refused("-o", "/proc/a.html")
    assert "File name too long" in refused("-o", tmp_path / f"{'a' * 252}.html")
    assert "File name too long" in refused(*out, model=Path("what is this? " * 19))
    assert "is not Unicode" in refused(*out, instruction="half \ud83d")
    assert not list(tmp_path.iterdir())
    gone = tmp_path / "gone.png"
    Image.new("RGB", (9, 9)).save(gone)
    build(tmp_path, tmp_path / "emptied")
    gone.unlink()
    assert "none of its 1 pictures can be read any more" in refused(*out, "--collection", tmp_path / "emptied", model=tmp_path)
    (tmp_path / "a.json").write_text("mine")
    assert "exists" in refused(*out)
