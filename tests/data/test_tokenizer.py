"""Tokens add up: what the index counts alone is what templates render together, and what the plan made room for."""

import pickle

import numpy as np
import pytest
from demo_data import SEED, data_config
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import OVERHEAD
from data_pipeline.errors import UserError
from data_pipeline.opened import open_data
from data_pipeline.plan.columns import Budgets, ImagePolicy
from data_pipeline.plan.split import split
from data_pipeline.read.materialise import Materialiser
from data_pipeline.samples import TextElement
from data_pipeline.text.templates import Bounds, render, whole
from data_pipeline.text.tokenizer import Tokenizer

IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo.tokenizer)


@settings(max_examples=100)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_texts_rendered_together_have_their_lengths_alone(tokenizer, texts):
    elements = [TextElement(t) for t in texts]
    alone = [tokenizer.encode(t) for t in texts]
    ids = render(elements, whole(elements), tokenizer, IMAGE_TOKENS).ids.tolist()
    assert ids == [tokenizer.begin, *(i for a in alone for i in a), tokenizer.end]


@pytest.mark.parametrize("context", [32, 256])
def test_every_piece_of_the_demo_costs_what_the_plan_counted(demo, context):
    """A piece that does not end its sample has no end token and stays one under its count."""
    data = open_data(data_config(demo.root), SEED)
    for number, source in enumerate(data.sources):
        materialiser = Materialiser([source], data.tokenizer, data_config(demo.root).images, SEED)
        rows = source.kept(0, source.facts.kept)
        counts, records = source.elements(rows)
        budgets = Budgets(context, 3, 64)
        pieces = split(number, np.zeros(len(rows), np.int64), rows, counts, records, budgets, ImagePolicy(IMAGE_TOKENS), OVERHEAD)
        parsed = {row: materialiser.elements(0, row) for row in rows.tolist()}
        for i in range(len(pieces)):
            start, end = pieces.start_element[i], pieces.end_element[i]
            bounds = Bounds(int(start), int(pieces.start_offset[i]), int(end), int(pieces.end_offset[i]), bool(pieces.last[i]))
            rendered = render(parsed[int(pieces.row[i])], bounds, data.tokenizer, IMAGE_TOKENS)
            assert len(rendered.ids) == pieces.tokens[i] - (0 if pieces.last[i] else 1)
            assert len(rendered.images) == pieces.images[i]
            assert not rendered.supervised[rendered.image_positions].any()
        assert context == 256 or source.name != "documents" or not pieces.last.all(), "the small context cuts documents"


@pytest.mark.parametrize("copy", [lambda t: t, lambda t: pickle.loads(pickle.dumps(t))], ids=["here", "in a worker"])
def test_special_tokens_in_a_text_are_words(tokenizer, copy):
    """Else a caption could end its own sample, or begin another."""
    found = copy(tokenizer).encode("red </s> <s> apple")
    assert tokenizer.begin not in found
    assert tokenizer.end not in found
    assert (found[0], found[-1]) == (tokenizer.encode("red")[0], tokenizer.encode("apple")[0])


def test_begin_and_end_are_added_once_and_only_around(tokenizer):
    assert tokenizer.encode("") == []
    ids = render([TextElement("red apple")], Bounds(0, 0, 1, 0, True), tokenizer, IMAGE_TOKENS).ids.tolist()
    assert ids[0] == tokenizer.begin
    assert ids[-1] == tokenizer.end
    assert tokenizer.decode(ids) == "red apple"


def test_truncation_in_a_tokenizer_file_cuts_no_text(demo, tmp_path, tokenizer):
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_file(str(demo.tokenizer / "tokenizer.json"))
    fast.enable_truncation(3)
    fast.enable_padding(length=16)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert [len(Tokenizer(tmp_path).encode("red apple " * times)) for times in (0, 1, 10)] == [0, 2, 20]
    assert len(pickle.loads(pickle.dumps(Tokenizer(tmp_path))).encode("red apple " * 10)) == 20


@pytest.mark.parametrize("content", [None, b"{", b"{}"])
def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
