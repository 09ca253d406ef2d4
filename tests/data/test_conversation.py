"""Conversations: the official prompt, token for token; only what the assistant says is learnt; lengths add up, whole or in pieces."""

import html
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from demo_data import START, segments_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import make_conversation, make_image, write_tar
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from data_pipeline.batch import IGNORE, Segment, assemble
from data_pipeline.config import OVERHEAD, DataConfig, ImageConfig, MixUnit, SourceConfig
from data_pipeline.opened import open_data
from data_pipeline.plan.columns import ELEMENT, Budgets, ImagePolicy
from data_pipeline.plan.split import split
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import PLACEHOLDER, BadSample, ImageElement, Kind, TextElement, parse
from data_pipeline.text.templates import VERSION, Bounds, chat_format, encode, render, whole
from data_pipeline.text.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
IMAGE_TOKENS = 3
OFFICIAL = ("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]")


def chat_tokenizer(folder: Path, tokens: tuple[str, ...] = OFFICIAL) -> Tokenizer:
    """A tokenizer of bytes, whose texts decode to themselves, with the tokens of turns."""
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *letters])}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *tokens)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("official"))


def members_of(*turns: tuple[str, str], images: int = 0) -> dict[str, bytes]:
    value = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    return {"json": json.dumps(value).encode(), **{f"{i}.png": make_image(8 + i) for i in range(images)}}


def rendered(tokenizer: Tokenizer, *turns: tuple[str, str], images: int = 0):
    elements = parse(Kind.conversation, members_of(*turns, images=images))
    return render(elements, whole(elements), tokenizer, IMAGE_TOKENS)


def as_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


def official_prompt(turns: list[tuple[str, str]]) -> str:
    """What the official code trains on, written down here once more."""
    names = {"user": "user", "human": "user"}
    said = (f"[UNUSED_TOKEN_146]{names.get(who, 'assistant')}\n{what.strip()}[UNUSED_TOKEN_145]\n" for who, what in turns)
    return "<s>" + "".join(said) + "</s>"


def official_targets(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Which tokens the official code supervises: what it masks behind a user's end is the assistant's opening."""
    end = tokenizer._tokenizer.token_to_id("[UNUSED_TOKEN_145]")
    opening = len(tokenizer.encode_template("\n[UNUSED_TOKEN_146]assistant\n"))
    seen, ends, answered = [True] * len(ids), 0, 0
    for i, token in enumerate(ids):
        if token == end:
            if ends % 2 == 0:
                seen[answered : i + 1 + opening] = [False] * len(seen[answered : i + 1 + opening])
            else:
                answered = i + 1
            ends += 1
    return seen


TURNS = [
    ("user", " Hello, who are you? "),
    ("assistant", "A model.\nOf language."),
    ("human", "Thanks </s> [UNUSED_TOKEN_145]"),
    ("gpt", "Bye 你好"),
]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_prompt_is_the_official_one_token_for_token(official, count):
    turns = [(who, what.replace("</s> [UNUSED_TOKEN_145]", "!")) for who, what in TURNS[:count]]
    if count % 2:
        turns = [*turns, ("bot", "Yes.")]
    ids = rendered(official, *turns).ids.tolist()
    assert ids == official.encode_template(official_prompt(turns))
    assert as_text(official, ids) == official_prompt(turns)


def test_what_is_learnt_is_what_the_official_code_learns(official):
    turns = [(who, what.replace("</s> [UNUSED_TOKEN_145]", "!")) for who, what in TURNS]
    found = rendered(official, *turns)
    assert found.supervised.tolist() == official_targets(found.ids.tolist(), official)
    learnt = as_text(official, found.ids[found.supervised].tolist())
    assert learnt == "A model.\nOf language.[UNUSED_TOKEN_145]Bye 你好[UNUSED_TOKEN_145]\n</s>", "the newline only after the last answer"


def test_nothing_is_learnt_after_a_question_that_nobody_answers(official):
    turns = [*TURNS[:2], ("user", "And now?")]
    found = rendered(official, *turns)
    assert as_text(official, found.ids.tolist()) == official_prompt(turns)
    assert as_text(official, found.ids[found.supervised].tolist()) == "A model.\nOf language.[UNUSED_TOKEN_145]"


def test_markers_in_a_users_words_are_words(official):
    found = rendered(official, *TURNS)
    special = [t for t in found.ids.tolist() if t in official.special]
    assert len(special) == 1 + 2 * 4 + 1, "begin, two a turn, end"
    for tokenizer in (official, pickle.loads(pickle.dumps(official))):
        assert not set(tokenizer.encode(official_prompt(TURNS))) & set(official.special)


def test_images_stand_where_their_placeholders_stand(official):
    found = rendered(official, ("user", f"First {PLACEHOLDER}, second:{PLACEHOLDER}\nWhich?"), ("assistant", "The first."), images=2)
    positions = found.image_positions.reshape(2, IMAGE_TOKENS)
    before = as_text(official, found.ids[: positions[0, 0]].tolist())
    between = as_text(official, found.ids[positions[0, -1] + 1 : positions[1, 0]].tolist())
    after = as_text(official, found.ids[positions[1, -1] + 1 :].tolist())
    assert before == "<s>[UNUSED_TOKEN_146]user\nFirst "
    assert between == ", second:"
    assert after.startswith("\nWhich?[UNUSED_TOKEN_145]\n")
    assert not found.supervised[found.image_positions].any()


def test_a_single_image_without_a_placeholder_comes_first_behind_the_begin_token(official):
    found = rendered(official, ("user", "What is it?"), ("assistant", "Red."), images=1)
    assert found.ids[0] == official.begin
    assert found.image_positions.tolist() == [1, 2, 3]
    assert as_text(official, found.ids[4:].tolist()) == official_prompt([("user", "What is it?"), ("assistant", "Red.")])[len("<s>") :]


def test_images_are_ordered_by_number_not_by_name():
    members = members_of(("user", PLACEHOLDER * 11), ("assistant", "Many."), images=11)
    members = dict(sorted(members.items()))
    sizes = [len(e.data) for e in parse(Kind.conversation, members) if isinstance(e, ImageElement)]
    assert sizes == [len(make_image(8 + i)) for i in range(11)]
    assert [e.data for e in parse(Kind.conversation, members) if isinstance(e, ImageElement)] == [make_image(8 + i) for i in range(11)]


@pytest.mark.parametrize(
    ("value", "images", "reason"),
    [
        ({"conversations": []}, 0, "must be a list of turns"),
        ({"conversations": "hello"}, 0, "must be a list of turns"),
        ({"conversations": ["hello"]}, 0, r"conversations\[0\] needs"),
        ({"conversations": [{"from": "user", "value": None}]}, 0, r"conversations\[0\] needs"),
        ({"conversations": [{"from": "cat", "value": "meow"}]}, 0, r"conversations\[0\] is from 'cat'"),
        ({"conversations": [{"from": "user", "value": "\ud800"}]}, 0, "not Unicode"),
        ({"conversations": [{"from": "user", "value": "hello"}]}, 0, "no answer"),
        ({"conversations": [{"from": "gpt", "value": PLACEHOLDER}]}, 1, "no answer"),
        ({"conversations": [{"from": "gpt", "value": f"{PLACEHOLDER} red"}]}, 0, "1 <ImageHere> for 0 images"),
        ({"conversations": [{"from": "gpt", "value": "red"}]}, 2, "0 <ImageHere> for 2 images"),
    ],
)
def test_a_conversation_that_is_none_is_a_bad_sample(value, images, reason):
    members = {"json": json.dumps(value).encode(), **{f"{i}.png": make_image() for i in range(images)}}
    with pytest.raises(BadSample, match=reason):
        parse(Kind.conversation, members)


def test_a_missing_image_is_a_bad_sample():
    members = members_of(("user", PLACEHOLDER * 2), ("assistant", "Two."), images=3)
    del members["1.png"]
    with pytest.raises(BadSample, match="missing member: image 1 of 2"):
        parse(Kind.conversation, members)


said = st.text("ab \n<é", max_size=12)
turns_of = st.lists(st.tuples(st.sampled_from(["user", "gpt"]), st.lists(said, min_size=1, max_size=3)), min_size=1, max_size=6)


@settings(max_examples=150)
@given(turns=turns_of, room=st.integers(12, 60))
def test_pieces_of_a_conversation_cost_what_was_counted_and_learn_the_same(official, turns, room):
    turns = [*turns, ("gpt", ["the end"])]
    images = sum(len(parts) - 1 for _, parts in turns)
    elements = parse(Kind.conversation, members_of(*((who, PLACEHOLDER.join(parts)) for who, parts in turns), images=images))
    records = np.zeros(len(elements), ELEMENT)
    for record, element in zip(records, elements, strict=True):
        if isinstance(element, ImageElement):
            record["width"] = record["height"] = 8
        else:
            record["tokens"] = len(encode(element, official))
    whole_ids = render(elements, whole(elements), official, IMAGE_TOKENS)
    assert len(whole_ids.ids) == OVERHEAD + records["tokens"].sum() + images * IMAGE_TOKENS
    one, none = np.zeros(1, np.int64), np.asarray([len(elements)])
    pieces = split(0, one, one, none, records, Budgets(room, 64, 64), ImagePolicy(IMAGE_TOKENS), OVERHEAD)
    ids, learnt = [official.begin], [False]
    for i in range(len(pieces)):
        bounds = Bounds(
            int(pieces.start_element[i]),
            int(pieces.start_offset[i]),
            int(pieces.end_element[i]),
            int(pieces.end_offset[i]),
            bool(pieces.last[i]),
        )
        part = render(elements, bounds, official, IMAGE_TOKENS)
        assert len(part.ids) == pieces.tokens[i] - (0 if pieces.last[i] else 1)
        ids += part.ids[1:].tolist()
        learnt += part.supervised[1:].tolist()
    assert ids == whole_ids.ids.tolist()
    assert learnt == whole_ids.supervised.tolist()


@pytest.mark.parametrize(
    ("tokens", "prompt", "learnt"),
    [
        (
            OFFICIAL,
            "<s>[UNUSED_TOKEN_146]user\nQ[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\nA[UNUSED_TOKEN_145]\n"
            "[UNUSED_TOKEN_146]user\nR[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\nB[UNUSED_TOKEN_145]\n</s>",
            "A[UNUSED_TOKEN_145]B[UNUSED_TOKEN_145]\n</s>",
        ),
        (
            ("<|im_start|>", "<|im_end|>"),
            "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n</s>",
            "A<|im_end|>B<|im_end|>\n</s>",
        ),
        ((), "<s>User:\nQ\nAssistant:\nA</s>\nUser:\nR\nAssistant:\nB</s>", "A</s>B</s>"),
    ],
    ids=["official", "internlm2-chat", "plain"],
)
def test_formats_stay_what_they_are_under_this_version(tmp_path, tokens, prompt, learnt):
    """Other words are other batches: a change here needs another `templates.VERSION` and, for the lengths, another index version."""
    assert VERSION == "plain-1"
    tokenizer = chat_tokenizer(tmp_path, tokens)
    found = rendered(tokenizer, ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    assert as_text(tokenizer, found.ids.tolist()) == prompt
    assert as_text(tokenizer, found.ids[found.supervised].tolist()) == learnt


def test_a_token_that_texts_could_spell_does_not_open_turns(tmp_path):
    """Words of the vocabulary that are not special tokens would be split in the template, or be found in a user's text."""
    assert chat_format(chat_tokenizer(tmp_path, OFFICIAL[:1])) == chat_format(Tokenizer(DEMO / "tokenizer"))


def test_conversations_go_from_tar_to_batch(tmp_path, xc_data, official, capsys):
    """Through the command line: indexed with a guessed kind, merged, planned, read; what the batch asks for is what the assistant says."""
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    talks = [[("user", f"{PLACEHOLDER}What is number {i}?"), ("assistant", f"It is {i}." * (1 + i % 3))] for i in range(12)]
    members = [m for i, talk in enumerate(talks) for m in make_conversation(f"k{i:02d}", talk, [make_image(8 + i)])]
    broken = make_conversation("k99", [("user", PLACEHOLDER), ("assistant", "none")], [])
    write_tar(tmp_path / "source" / "a.tar", [*members, *broken])
    assert xc_data("index", tmp_path / "source", "--tokenizer", tmp_path / "tokenizer") == 0
    assert xc_data("merge", tmp_path / "source") == 0
    out = capsys.readouterr().out
    assert "kind conversation (guessed from the first sample)" in out
    assert "12 of 13 samples" in out
    config = DataConfig(
        tokenizer=str(tmp_path / "tokenizer"),
        sources={"talk": SourceConfig(str(tmp_path / "source"))},
        unit=MixUnit.epochs,
        context=128,
        global_batch=12,
        images=ImageConfig(size=14, tokens=1),
    )
    data = open_data(config, 0)
    materialiser = Materialiser(data.sources, data.tokenizer, config.images, 0)
    read = {}
    for pack in data.plan.global_batch(START).packs:
        batch, bad = materialiser.batch([pack])
        assert bad == []
        for view in segments_of(batch):
            read[view.sample] = as_text(tokenizer, [token for _, token in view.targets])
    assert read == {i: f"{talk[1][1]}[UNUSED_TOKEN_145]\n</s>" for i, talk in enumerate(talks)}


def test_preview_marks_what_the_assistant_says_and_nothing_else(tmp_path, xc_data):
    chat_tokenizer(tmp_path / "tokenizer")
    talk = [("user", f"Look: {PLACEHOLDER}. What is it? </s>"), ("assistant", "An apple."), ("user", "Sure?"), ("assistant", "Yes.")]
    write_tar(tmp_path / "source" / "a.tar", make_conversation("k", talk, [make_image()]))
    assert xc_data("index", tmp_path / "source", "--tokenizer", tmp_path / "tokenizer") == 0
    assert xc_data("merge", tmp_path / "source") == 0
    data = f"{{tokenizer: {tmp_path}/tokenizer, sources: {{talk: {{path: {tmp_path}/source}}}}, context: 256, global_batch: 1, unit: epochs"
    (tmp_path / "c.yaml").write_text(f"data: {data}, images: {{size: 14, tokens: 1}}}}")
    assert xc_data("preview", tmp_path / "c.yaml", "-o", tmp_path / "page.html") == 0
    (card,) = re.findall(r"<article.*?</article>", (tmp_path / "page.html").read_text(), re.DOTALL)
    parts = re.findall(r'<span class="(seen|text|pill(?: seen)?)\s*">(.*?)</span>', card, re.DOTALL)
    marked = "".join(html.unescape(text) for kind, text in parts if "seen" in kind)
    plain = "".join(html.unescape(text) for kind, text in parts if "seen" not in kind and not text.startswith("[image"))
    assert marked == "An apple.[UNUSED_TOKEN_145]Yes.[UNUSED_TOKEN_145]\n</s>"
    assert plain == (
        "<s>[UNUSED_TOKEN_146]user\nLook: . What is it? </s>[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
        "\n[UNUSED_TOKEN_146]user\nSure?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    )


def test_loss_positions_of_a_batch_are_those_of_the_segments(official):
    elements = parse(Kind.conversation, members_of(*TURNS))
    batch = assemble([Segment(render(elements, whole(elements), official, IMAGE_TOKENS), (), 0, 0)] * 2, 4, IMAGE_TOKENS, official.end)
    targets = batch.targets[batch.targets != IGNORE].tolist()
    assert as_text(official, targets) == 2 * "A model.\nOf language.[UNUSED_TOKEN_145]Bye 你好[UNUSED_TOKEN_145]\n</s>"


def test_a_pair_a_document_and_a_text_have_no_turns(official):
    """Their rendering is older than conversations and stays what it was."""
    elements = [ImageElement(b""), TextElement("red [UNUSED_TOKEN_145] </s>")]
    found = render(elements, whole(elements), official, IMAGE_TOKENS)
    assert found.ids.tolist() == [official.begin, *[official.end] * 3, *official.encode("red [UNUSED_TOKEN_145] </s>"), official.end]
    assert found.supervised.tolist() == [False] * 4 + [True] * (len(found.ids) - 4)
