"""Chat reads paths as pictures, lays a conversation out as training does, and refuses in one line."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from finished_run import write_run
from hostile_members import jpeg_scans
from PIL import Image

from compose import chat
from compose.assistant import Assistant, Said, Turn, _elements, _Teller, ask, load
from compose.cli import main
from compose.pictures import Picture
from compose.prompts import Placed, choose
from data_pipeline.errors import UserError
from data_pipeline.samples import Kind, Role, TextElement, parse
from data_pipeline.text.templates import render, whole
from train.generate import GREEDY, KeyValueCache, generate


@pytest.fixture(scope="module")
def assistant(run_dir) -> Assistant:
    return load(run_dir)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a red apple.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def test_a_prompt_is_what_training_shows_before_the_answer(assistant, picture):
    data = picture.read_bytes()
    spoken = [("user", "look: <ImageHere> what is it?"), ("assistant", "red apple"), ("user", "and <ImageHere><ImageHere>")]
    sample = {"conversations": [{"from": who, "value": text} for who, text in [*spoken, ("assistant", "parrot")]]}
    members = {"json": json.dumps(sample).encode(), "0.png": data, "1.png": data, "2.png": data}
    elements = parse(Kind.conversation, members)
    trained = render(elements, whole(elements), assistant.tokenizer, 1)
    p = Picture("p", data)
    turns = [
        Turn(Role.user, ["look: ", p, " what is it?"]),
        Turn(Role.assistant, ["red apple"]),
        Turn(Role.user, ["and ", p, p]),
    ]
    prompt = assistant._render(_elements(turns))
    length = len(prompt.ids)
    assert prompt.ids.tolist() == trained.ids[:length].tolist()
    assert prompt.image_positions.tolist() == trained.image_positions.tolist()
    assert trained.supervised[length:].all(), "what follows is the answer and its end"


def test_a_question_of_composition_is_what_training_shows(assistant, picture):
    """Its parts are many; training encodes what stands between two pictures at once."""
    pictures = [Picture(str(i), picture.read_bytes()) for i in range(4)]
    placed = [Placed("A line. "), Placed("  Another", [(pictures[0], "words")])]
    parts = choose("A title", placed, "a caption", pictures)
    words = "".join("<ImageHere>" if isinstance(part, Picture) else part for part in parts)
    sample = {"conversations": [{"from": "user", "value": words}, {"from": "assistant", "value": "A"}]}
    members = {"json": json.dumps(sample).encode(), **{f"{i}.png": picture.read_bytes() for i in range(5)}}
    elements = parse(Kind.conversation, members)
    assert (
        assistant.spoken(ask(*parts), " A\n").rendered.ids.tolist()
        == render(elements, whole(elements), assistant.tokenizer, 1).ids.tolist()
    )
    assert [e for e in _elements(ask(*parts)) if isinstance(e, TextElement)] == [e for e in elements[:-2] if isinstance(e, TextElement)]


def test_paths_in_a_line_are_pictures_in_their_places(picture, tmp_path):
    plain = tmp_path / "B.JPG"
    Image.new("RGB", (8, 8)).save(plain)
    parts = chat.parts(f'first "{picture}" then {plain}? see a.txt and page.pngs')
    assert [p if isinstance(p, str) else p.name for p in parts] == ["first ", picture.name, " then ", "B.JPG", "? see a.txt and page.pngs"]
    with pytest.raises(UserError, match=r"no picture at .*/gone\.webp: No such file or directory \(check the path\)"):
        chat.parts("what is gone.webp")
    with pytest.raises(UserError, match=r"no picture at .*~nobody-here\.png"):
        chat.parts("what is ~nobody-here.png")
    (tmp_path / "broken.png").write_bytes(plain.read_bytes()[:40])
    with pytest.raises(UserError, match="does not decode as a picture"):
        chat.parts(f"what is {tmp_path}/broken.png")


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("what's in 'my photo.png'?", ["what's in ", "my photo.png", "?"]),
        ("the dogs' home in 'my photo.png', isn't it", ["the dogs' home in ", "my photo.png", ", isn't it"]),
        ("""'my dog's photo.png' or "my dog's photo.png"?""", ["my dog's photo.png", " or ", "my dog's photo.png", "?"]),
        ("'tis 'a.png' and 'b.png'", ["'tis ", "a.png", " and ", "b.png"]),
        ("'a' is no 'my photo.png'", ["'a' is no ", "my photo.png"]),
        ("an apple (a.png), no?", ["an apple (", "a.png", "), no?"]),
        ("a.png,b.png;[a.png]", ["a.png", ",", "b.png", ";[", "a.png", "]"]),
        ("\u201ca.png\u201d: what's this", ["\u201c", "a.png", "\u201d: what's this"]),
        ("photo(1).png? it's a.png.", ["photo(1).png", "? it's ", "a.png", "."]),
        ("a.png.jpg and a.png.txt", ["a.png.jpg", " and a.png.txt"]),
        ("../HERE/a.png", ["a.png"]),
        ("a.png里有什么？", ["a.png", "里有什么？"]),
        ("看（a.png）、b.png。", ["看（", "a.png", "）、", "b.png", "。"]),
    ],
)
def test_a_path_is_told_from_the_quotes_and_marks_around_it(tmp_path, monkeypatch, line, read):
    for name in ("a.png", "b.png", "my photo.png", "my dog's photo.png", "photo(1).png", "a.png.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    monkeypatch.chdir(tmp_path)
    assert [p if isinstance(p, str) else p.name for p in chat.parts(line.replace("HERE", tmp_path.name))] == read


@pytest.mark.timeout(30)  # each of these takes a thousandth of that, or hours
@pytest.mark.parametrize("line", ['"' + "it's " * 200, "'" + "a's" * 200, "a," * 50_000, "' " * 50_000, "x" * 100_000])
def test_a_line_without_a_path_is_read_in_no_time(line):
    assert chat.parts(line) == [line]


def test_ask_prints_the_same_answer_every_time_and_another_for_another_picture(run_dir, picture, capsys):
    def ask(line: str, *options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["chat", str(run_dir), "--ask", line, "--max-tokens", "12", *options])
        assert not ended.value.code
        return capsys.readouterr().out

    first = ask(f"what is '{picture}'")
    assert first == ask(f"what is '{picture}'")
    Image.new("RGB", (8, 8), "white").save(picture)
    assert ask(f"what is '{picture}'") != first
    drawn = [ask("hello", "--temperature", "3", "--seed", str(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_at_the_token_that_ends_a_turn_and_does_not_show_it(demo, tmp_path, picture):
    file = shutil.copytree(demo.tokenizer, tmp_path / "tokenizer") / "tokenizer.json"
    settings = json.loads(file.read_text())
    for word, number in list(settings["model"]["vocab"].items())[-2:]:
        name = f"[UNUSED_TOKEN_{145 + number % 2}]"
        settings["model"]["vocab"][name] = settings["model"]["vocab"].pop(word)
        settings["added_tokens"].append({**settings["added_tokens"][0], "id": number, "content": name})
    file.write_text(json.dumps(settings))
    talker = load(write_run(demo, tmp_path / "run", tokenizer=str(file.parent)))
    turns = [Turn(Role.user, ["what is it? ", Picture("p", picture.read_bytes())])]
    ids = generate(talker.model, [talker._prompt(turns)], talker.tokenizer, 12)[0].ids
    (end,) = talker.tokenizer.encode_template("[UNUSED_TOKEN_145]")
    assert not talker.answer(turns, 12).whole and end not in ids
    at = next(i for i in range(3, 12) if ids.index(ids[i]) == i)
    rows = talker.model.head.weight.data
    rows[[ids[at], end]] = rows[[end, ids[at]]]  # where it wrote that word, it ends its turn
    assert talker.answer(turns, 12) == Said(talker.tokenizer.decode(ids[:at]).strip(), whole=True)
    conversation = chat.Chat(talker, 12, GREEDY)
    assert conversation.say(f"what is it? '{picture}'")[1] == "", "nothing to remark"


def test_an_answer_is_told_while_it_is_written_piece_by_piece_and_no_character_by_halves(assistant, monkeypatch):
    steps, heard = [], []
    monkeypatch.setattr(KeyValueCache, "step", lambda *of, real=KeyValueCache.step: steps.append(1) or real(*of))
    said = assistant.answer(ask("hello"), 24, hear=lambda words: heard.append((len(steps), words)))
    assert "".join(words for _, words in heard) == said.text
    assert heard[0][0] < len(steps) / 2
    text, pieces = "  naïve café, 猫と犬 🦜  ", []
    bytewise = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))  # as byte-level tokenizers read what they lack
    teller = _Teller(bytewise, pieces.append)
    for byte in text.encode():
        teller.word(0, byte)
    assert "".join(pieces) == text.strip() and "\ufffd" not in "".join(pieces)
    teller.word(0, "猫".encode()[0])
    teller.end(f"{text.strip()}  \ufffd")
    assert "".join(pieces) == f"{text.strip()}  \ufffd", "half a character is told where nothing follows"


def test_what_no_longer_fits_is_forgotten_turn_by_turn_and_said(assistant):
    conversation = chat.Chat(assistant, 40, GREEDY)
    for _ in range(3):
        _, remark = conversation.say("red apple " * 100)
    assert "earlier turns no longer fit" in remark
    assert conversation.turns[0].role is Role.user
    said = list(conversation.turns)
    with pytest.raises(UserError, match="too many for a model that was trained on 512"):
        conversation.say("word " * 20_000)
    assert conversation.turns == said, "a refused line was not said"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  ", r"--ask is empty \(ask something\)"),
        ("what is gone.png", r"no picture at .*gone\.png: No such file or directory \(check the path\)"),
        ("apple " * 17_000, r"\d+ tokens of prompt are too many for a model that was trained on 512 \(shorten it\)"),
    ],
)
def test_a_line_that_cannot_be_asked_is_refused_in_one_line(run_dir, capsys, line, message):
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run_dir), "--ask", line])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(f"error: {message}\n", error), error


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--top-p", value) for value in ("0", "1.1", "nan")),
        *(("--temperature", value) for value in ("-1", "1e-40", "inf")),
        ("--seed", "1" + "0" * 30),
        ("--max-tokens", "0"),
    ],
)
@pytest.mark.parametrize("command", [["chat", "--ask", "hello"], ["article", "--instruction", "x", "-o", "a.html"]])
def test_a_way_of_drawing_words_that_there_is_not_is_refused_in_one_line(tmp_path, capsys, command, option, value):
    name, *rest = command
    with pytest.raises(SystemExit) as ended:
        main([name, str(tmp_path), *rest, option, value])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith(f"xc-compose {name}: error: argument {option}: '{value}' is no")
    assert [line for line in said if not line.startswith(("usage:", " "))] == said[-1:], "beside how the command is used"


def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_line(demo, tmp_path, picture, capsys):
    def refused(folder: Path, line: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["chat", str(folder), "--ask", line])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "is no run directory" in refused(tmp_path, "hello")
    language = write_run(demo, tmp_path / "language", "language")
    assert "stage language, which has seen no picture" in refused(language, f"'{picture}'")
    (language / "final" / "manifest.json").unlink()
    assert "has no final weights" in refused(language, "hello")
    assert "stage language, which has seen no picture" in refused(language, f"'{picture}'"), "before weights are looked for"
    assert "tokens of prompt are too many" in refused(language, "apple " * 17_000)


def test_a_checkpoint_that_was_taught_no_conversation_answers_with_a_note(demo, tmp_path, capsys):
    language = write_run(demo, tmp_path / "language", "language")
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(language), "--ask", "hello", "--max-tokens", "2"])
    assert ended.value.code == 0
    assert "is of stage language, which teaches no conversation" in capsys.readouterr().err


def test_a_picture_that_decodes_but_that_training_refuses_is_refused_in_one_line(run_dir, tmp_path, capsys):
    (tmp_path / "many.jpg").write_bytes(jpeg_scans(64, 500))
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run_dir), "--ask", f"what is {tmp_path / 'many.jpg'}"])
    assert ended.value.code == 2
    assert re.fullmatch("error: .*many.jpg does not decode as a picture .*\n", capsys.readouterr().err)


def test_control_c_is_said_in_one_line(run_dir, monkeypatch, capsys):
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "ask_once", stopped)
    monkeypatch.setattr("sys.excepthook", None)  # put back behind the test
    with pytest.raises(KeyboardInterrupt):
        main(["chat", str(run_dir), "--ask", "hello"])
    assert capsys.readouterr().err == "interrupted\n"


def test_a_mistake_costs_its_line_and_new_forgets(run_dir, picture, monkeypatch, capsys):
    lines = ["what is gone.png", f"what is '{picture}'", "and now", "/new", f"what is '{picture}'"]
    typed = "\n".join(["caf\udce9", *lines]).encode(errors="surrogateescape")  # the first is Latin-1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run_dir), "--max-tokens", "8"])
    said = capsys.readouterr()
    assert not ended.value.code
    first, second, third = said.out.splitlines()
    assert first == third != second
    not_text, *rest = said.err.splitlines()
    assert "bytes that are not UTF-8" in not_text and rest[0].startswith("error: no picture at")
