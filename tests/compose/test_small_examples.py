"""The small model's data: what is held out is not trained on, conversations are samples that training reads, the tokenizer fits."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from data_pipeline.samples import AnswerEndElement, ImageElement, Kind, TextElement, parse
from data_pipeline.text.templates import chat_format
from data_pipeline.text.tokenizer import Tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples() -> None:
    pytest.importorskip("lxml")
    sys.path[:0] = [str(EXAMPLES / "small"), str(EXAMPLES / "demo")]
    yield
    del sys.path[:2]


def drawing(seed: int, side: int = 60) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 8, (3, 3)) * 32 + 16  # the middle of a step: scaling does not cross it
    return Image.fromarray(values.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST).convert("RGB")


def called(number: int) -> str:
    """A label of its own, without digits."""
    return "thing " + "".join(chr(ord("p") + int(digit)) for digit in str(number))


def test_pairs_that_share_a_label_or_a_picture_stay_on_one_side(monkeypatch):
    from packages import Document, Figure, Pair
    from small_data import candidates, concepts, split, thumb

    pairs = [Pair(f"a-{i}", called(i), drawing(i)) for i in range(40)]
    pairs += [
        Pair("b-1", f"toys: A {called(1)}", drawing(90)),
        Pair("b-2", "other", drawing(2, 90)),
        Pair("b-3", "third", drawing(90, 120)),
    ]
    groups = {tuple(p.key for p in group) for group in concepts(pairs)}
    assert ("a-1", "b-1", "b-3") in groups, "through a label, whatever the category, and on through a picture"
    assert ("a-2", "b-2") in groups, "the same picture in another size"
    assert sum(map(len, groups)) == len(pairs)
    monkeypatch.setattr("small_data.HELD_OUT", 6)
    page = Document("page", ["Title", called(5).title(), Figure(drawing(6, 90), called(7))])
    training, held_out = split(pairs, [page])
    assert {"a-5", "a-6", "a-7"} <= {p.key for p in training}, "a document tells them"
    assert len(training) + sum(map(len, held_out.values())) == len(pairs)
    for half, held in held_out.items():
        assert len(held) >= 6
        assert not {p.label for p in held} & {p.label for p in training}
        assert not {thumb(p.image) for p in held} & {thumb(p.image) for p in training}
        for item in candidates(half, held):
            assert item["candidates"][item["answer"]] == item["caption"]


def test_what_training_shows_in_another_colour_number_side_or_size_is_not_held_out():
    from captions import thing_of
    from packages import Pair
    from small_data import split

    kinds = [f"signs: {called(i)} ({colour})" for i in range(300) for colour in ("red", "blue", "b and w")]
    training, held_out = split(Pair(f"{i:03}", caption, drawing(i)) for i, caption in enumerate(kinds))
    shown = {thing_of(pair.caption) for pair in training}
    held = [pair for half in held_out.values() for pair in half]
    assert held and not {thing_of(pair.caption) for pair in held} & shown
    same = ["led square (red)", "An LED square 2", "animal: large led square", "led square left"]
    assert {thing_of(caption) for caption in same} == {"led square"}
    assert [thing_of(caption) for caption in ("keycap: 10", "heart: red")] == ["10", "red"], "nothing else is left of them"


def test_candidates_that_are_alike_come_from_the_category_first_and_then_from_its_neighbours():
    from packages import Pair
    from small_data import ALIKE, candidates

    captions = ["animal bird: owl", "animal bird: hen", "animal bug: ant", *(f"tool: {i}" for i in range(20))]
    owl = candidates(ALIKE, [Pair(str(i), caption, drawing(i)) for i, caption in enumerate(captions)])[0]
    assert len(owl["candidates"]) == 10 and {"animal bird: hen", "animal bug: ant"} < set(owl["candidates"])
    assert owl["candidates"][owl["answer"]] == owl["caption"] == "animal bird: owl"


def test_held_out_pages_share_no_picture_caption_or_paragraph_with_training(monkeypatch):
    from packages import Document, Figure, Pair
    from small_data import split_documents, unseen_paragraphs

    monkeypatch.setattr("small_data.HELD_OUT_DOCUMENTS", 40)
    words = "one two three four five six"
    pages = [
        Document(f"p-{i}", [f"Title {i}", f"{words} {i}", "Six words that all pages have.", Figure(drawing(i), f"F {i}")])
        for i in range(60)
    ]
    twins = [Document("twin-a", ["A", Figure(drawing(80), "T a")]), Document("twin-b", ["B", Figure(drawing(80, 90), "T b")])]
    named = [Document("named-a", ["A", Figure(drawing(81), "Same")]), Document("named-b", ["B", Figure(drawing(82), "same")])]
    told = [Document("told-a", ["A", Figure(drawing(84), "Told")]), Document("told-b", ["told", Figure(drawing(85), "T b")])]
    drawn = Document("drawn", ["A", Figure(drawing(83), None)])
    training, held_out = split_documents(
        [*pages, *twins, *named, *told, drawn], [Pair("p", "x", drawing(83, 120)), Pair("q", "F 7", drawing(99))]
    )
    assert len(held_out) == 40 and len(training) == 27
    assert {"twin-a", "twin-b", "named-a", "named-b", "told-a", "told-b", "drawn", "p-7"} <= {d.name for d in training}
    paragraphs = [s["txt"] for s in unseen_paragraphs(held_out, training)]
    assert len(paragraphs) == 40 and "Six words that all pages have." not in paragraphs


def test_pages_about_music_that_show_or_say_what_is_held_out_are_left_out():
    from packages import Document, Figure, Pair
    from small_data import telling_nothing

    unseen = [Document("unseen", ["See also", "Five words that stand nowhere.", Figure(drawing(50), "A held-out dialog")])]
    paragraphs = [{"__key__": "unseen-1", "txt": "Five words that stand nowhere."}]
    pages = {
        "said": ["Piano", Figure(drawing(1), None)],
        "shown": ["Title", Figure(drawing(60, 90), None)],
        "captioned": ["Title", Figure(drawing(2), "a held-out dialog")],
        "drawn": ["Title", Figure(drawing(50, 90), None)],
        "quoted": ["Five words that STAND nowhere.", Figure(drawing(3), None)],
        "free": ["See also", "Piano music", Figure(drawing(4), None)],
    }
    left = telling_nothing((Document(*page) for page in pages.items()), [Pair("p", "object: a piano", drawing(60))], unseen, paragraphs)
    assert [page.name for page in left] == ["free"], "a heading is not held out, which stands on any page"


def test_pages_about_music_are_english_ones_and_keep_wide_pictures_of_their_other_package(monkeypatch, tmp_path):
    import packages
    from packages import MUSIC, MUSIC_HELP, MUSIC_PICTURES, PAGES, SIDE, Pages

    def encoded(*size: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        return buffer.getvalue()

    page = (
        f"<html><body><div id='main'><h3>1.1 Ties</h3><p>{'word ' * 40}</p><p><a href='x.ly'><img src='../ab/wide.png'></a></p>"
        "<p><img src='../ab/flat.png'></p></div><div id='tocframe'><p>All pages</p></div></body></html>"
    ).encode()
    trees = {
        MUSIC_HELP: {f"{n}.html": page for n in ("notation/ties", "notation/ties.de", "notation-big-page", "notation-big-page/ties.ja")},
        MUSIC_PICTURES: {"ab/wide.png": encoded(1000, 40), "ab/flat.png": encoded(300, 20)},
    }
    monkeypatch.setattr(packages, "fetch", lambda package, folder: package)
    monkeypatch.setattr(packages, "read_members", lambda package, prefix: trees[package])
    [document] = packages.read_documents(tmp_path, MUSIC)
    assert document.name.startswith("lilypond-notation-ties-")
    assert document.paragraphs == ["1.1 Ties", ("word " * 40).strip()], "the table of contents is no part of it"
    assert [figure.image.size for figure in document.figures] == [(4 * SIDE, 36)]
    square = {"lilypond": Pages(MUSIC["lilypond"].packages, "", MUSIC["lilypond"].names, PAGES["gimp"].bounds)}
    assert not list(packages.read_documents(tmp_path, square)), "which elsewhere are no pictures"


@pytest.mark.parametrize("trained", ["food: A red apple", "plants: the red apple", "food: 2 green apple", None])
def test_a_build_that_trains_on_what_it_holds_out_ends(tmp_path, trained):
    from packages import Pair
    from small_data import HELD_OUT_SOURCES, TRAINING, check, pair_samples, write_shards

    folders = (*TRAINING, *HELD_OUT_SOURCES)
    validation, other = folders.index("heldout/validation"), len(folders)

    def side(folder: str, caption: str, seed: int) -> None:
        write_shards(tmp_path / folder / "%06d.tar", pair_samples([Pair("a-1", caption, drawing(seed))]))

    for number, folder in enumerate(folders):
        side(folder, called(number), number)
    check(tmp_path, {"a caption"})
    side("pairs", trained or "other", validation if trained is None else other)
    side("heldout/validation", "food: a red apple", validation)
    with pytest.raises(SystemExit, match=r"heldout/validation: 0 pictures .*apple" if trained else "heldout/validation: 1 pictures"):
        check(tmp_path, set())


def test_a_build_that_says_what_it_holds_out_in_a_page_ends(tmp_path):
    from packages import Document, Figure, Pair
    from small_data import HELD_OUT_SOURCES, TRAINING, check, document_sample, pair_samples, write_shards

    for number, folder in enumerate((*TRAINING, *HELD_OUT_SOURCES)):
        write_shards(tmp_path / folder / "%06d.tar", pair_samples([Pair("a-1", called(number), drawing(number))]))
    for said in ("Red apples", "Red apple"):
        sample = document_sample(Document("page", ["Fruit", said, Figure(drawing(90), None), "The end."]), "\n")
        write_shards(tmp_path / "lilypond" / "%06d.tar", [sample])
        write_shards(tmp_path / "heldout/test" / "%06d.tar", pair_samples([Pair("a-1", "food: A red apple", drawing(91))]))
        if said == "Red apples":
            check(tmp_path, set())
    assert json.loads(sample["json"])["texts"] == ["Fruit\n", "Red apple\n", None, "The end.\n"], "or they would be read without a space"
    with pytest.raises(SystemExit, match=r"heldout/test: 0 pictures .*red apple"):
        check(tmp_path, set())


def test_a_package_that_cannot_be_downloaded_is_one_line(tmp_path):
    from sources import Package, fetch

    for command, said in ((("no-such-program",), "No such file"), (("false",), "exit status 1")):
        with pytest.raises(SystemExit, match=rf"^error: .*a\.deb cannot be downloaded: .*{said}.* \(mend that, or put the file there\)$"):
            fetch(Package("a.deb", "0" * 64, command), tmp_path)


def test_data_of_an_older_version_is_said(tmp_path, monkeypatch):
    import small_data

    (tmp_path / "data" / "pairs").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["small_data.py", "--packages", str(tmp_path), "--out", str(tmp_path / "data"), "--tokenizer", "t"])
    with pytest.raises(SystemExit, match=r"^error: .*data has no captions: an older version built it \(remove it"):
        small_data.main()


def test_conversations_are_samples_and_their_answers_stand_in_the_data():
    from conversations import of_composition, of_documents, of_pairs, webp
    from packages import Document, Figure, Pair

    pairs = [Pair(f"clip-{i}", f"thing {i}", drawing(i)) for i in range(30)]
    figure = Figure(drawing(1), "A dialog")
    pages = [
        Document(f"page-{i}", [f"Title {i}", "First words.", "More words.", figure, "The end.", Figure(drawing(i), None)]) for i in range(5)
    ]
    samples = {}
    for sample in [*of_pairs(pairs, webp), *of_documents(pages), *of_composition(pages, webp)]:
        key = sample.pop("__key__")
        samples[key] = parse(Kind.conversation, {k: v if isinstance(v, bytes) else v.encode() for k, v in sample.items()})
    answers = {key: next(e.text for e in elements if isinstance(e, TextElement) and e.supervised) for key, elements in samples.items()}
    assert all(isinstance(e[-1], AnswerEndElement) for e in samples.values())
    assert answers["caption-clip-3"] == "thing 3"
    assert answers["about-page-1"] == "Title 1"
    assert answers["write-page-1"] == "Title 1\nFirst words.\nMore words.\nThe end."
    assert answers["lines-page-1"] == "<Seg1>, <Seg2>"
    assert answers["figure-page-1-1"] == "A dialog"
    letter = "ABCD".index(answers["choose-page-1-1"])
    shown = [e.data for e in samples["choose-page-1-1"] if isinstance(e, ImageElement)]
    assert shown[letter] == webp(figure.image)
    assert len(set(shown)) == 4, "though every page holds the same figure"
    others = {webp(drawing(page)) for page in (0, 2, 3, 4)}
    assert set(shown) - {webp(figure.image)} <= others, "of other pages"
    assert not [s for s in of_composition(pages[:3], webp) if s["__key__"].startswith("choose-")], "three that differ are nowhere else"
    which = [key for key in samples if key.startswith("which-")]
    for key in which:
        asked = next(e.text for e in samples[key] if isinstance(e, TextElement) and not e.supervised)
        assert f"{answers[key]}. thing {key.split('-')[-1]}\n" in asked
    assert 5 < len(which) < 25


def test_figures_for_articles_are_those_with_a_caption():
    from packages import Document, Figure
    from small_data import captioned_figures

    page = Document("page", ["Title", Figure(drawing(1), None), "Words.", Figure(drawing(2), "A chart")])
    assert [(pair.key, pair.caption) for pair in captioned_figures([page])] == [("page-1", "A chart")]


def test_a_renamed_tokenizer_has_begin_end_and_turns(tmp_path):
    from small_weights import rename_tokens

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = FastTokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(words[:4])
    fast.save(str(tmp_path / "tokenizer.json"))
    rename_tokens(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.end, tokenizer.begin) == (0, 3)
    assert tokenizer.encode_template(chat_format(tokenizer).end_answer) == [2]
    assert tokenizer.decode(tokenizer.encode("ä word</s>")) == "ä word</s>", "special only where a template says so"
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"] is None


def test_a_title_that_many_drawings_bear_is_no_caption():
    from packages import telling

    titles = {"a": "jigsaw", "b": "boat", **{f"icon {i}": "icon collection" for i in range(4)}, "c": "boat", "d": None}
    assert telling(titles) == {"a": "jigsaw", "b": "boat", "c": "boat"}


def test_a_picture_that_is_none_or_too_small_is_left_out():
    from packages import open_image

    def encoded(*size: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        return buffer.getvalue()

    assert open_image(encoded(600, 300)).size == (224, 112)
    assert open_image(encoded(40, 100)) is None
    assert open_image(encoded(500, 60)) is None
    assert open_image(b"no picture") is None
    assert open_image(encoded(100, 100)[:60]) is None
