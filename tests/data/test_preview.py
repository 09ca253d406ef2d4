"""What the preview's cards and first lines promise: nothing but what the batch holds, a sample found by its key, a bad template seen."""

import html
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_yaml import write_stage
from tars import make_image, make_pairs, write_tar

from data_pipeline.configure import load_data_view
from data_pipeline.inspect.packs import Part, Viewer, walk
from data_pipeline.inspect.patterns import Token, fold, patterns, tokens_of
from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor
from data_pipeline.read import materialise
from data_pipeline.read.materialise import Materialiser
from data_pipeline.text import templates

START = Cursor(0, 0)


@pytest.fixture
def config(demo, tmp_path) -> Path:
    return write_stage(tmp_path / "demo.yaml", demo)


def opened(config: Path, *overrides: str):
    view = load_data_view(config, overrides)
    data = open_data(view.data, view.run.seed)
    return data, Viewer(Materialiser(data.sources, data.tokenizer, view.data.images, view.run.seed))


def marked(page: str) -> list[str]:
    """Keys of the cards that are marked."""
    return re.findall(r'<article class="card[^"]* asked".*?<code>(.*?)</code>', page, re.DOTALL)


def test_walking_packs_is_walking_batches_also_where_windows_end(config):
    data, _ = opened(config, "data.window=150", "data.global_batch=7")
    walked = list(walk(data.plan, START))
    cursor, packs = START, []
    while batch := data.plan.global_batch(cursor).packs:
        packs += batch
        cursor = data.plan.global_batch(cursor).cursor
    assert len(walked) == len(packs)
    assert data.plan.windows > 3
    for (at, pieces), expected in zip(walked, packs, strict=True):
        assert pieces.row.tolist() == expected.row.tolist() == data.plan.window(at.window).pack(at.pack).row.tolist()


def test_a_micro_batch_of_several_packs_shows_what_each_pack_alone_shows(config):
    data, viewer = opened(config)
    at, packs = zip(*[pack for pack, _ in zip(walk(data.plan, START), range(3), strict=False)], strict=True)
    batch, together = viewer.view(packs, at)
    alone = [viewer.view([pieces], [place])[1][0] for place, pieces in zip(at, packs, strict=True)]
    assert [view.cards for view in together] == [view.cards for view in alone]
    assert {view.length for view in together} == {len(batch.input_ids)}
    assert sum(view.tokens for view in together) == sum(batch.segment_lengths[:-1])
    assert sum(view.supervised for view in together) == batch.supervised


@pytest.mark.parametrize("source", ["pairs", "documents", "text"])
def test_the_pack_of_a_key_is_the_first_that_holds_the_sample(config, tmp_path, xc_data, source):
    data, _ = opened(config, "data.window=150")
    number = [s.name for s in data.sources].index(source)
    row = int(data.sources[number].kept(40, 41)[0])
    key = data.sources[number].key(row)
    assert xc_data("preview", config, "data.window=150", "--key", key, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    first = next(at for at, pieces in walk(data.plan, START) if row in pieces.row[pieces.source == number])
    assert f"window {first.window}, pack {first.pack}<" in page
    assert key in marked(page)


def test_a_sample_in_parts_is_shown_in_all_its_packs(config, tmp_path, xc_data):
    data, _ = opened(config, "data.context=64")
    packs = list(walk(data.plan, START))
    number = [s.name for s in data.sources].index("documents")
    row = int(next(p.row[p.source == number][0] for _, p in packs if (~p.last[p.source == number]).any()))
    key = data.sources[number].key(row)
    assert xc_data("preview", config, "data.context=64", "--key", key, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('<section class="pack"') == sum(row in p.row[p.source == number] for _, p in packs)
    assert len(marked(page)) == sum(int((p.row[p.source == number] == row).sum()) for _, p in packs)


def test_a_key_that_nothing_has_or_nothing_draws_is_a_mistake(demo, config, tmp_path, xc_data, capsys):
    assert xc_data("preview", config, "--key", "no-such-key", "-o", tmp_path / "page.html") == 2
    assert "no sample of pairs, documents, text has this key" in capsys.readouterr().err
    key = open_data(load_data_view(config).data, 3).sources[0].key(5)
    assert xc_data("preview", config, "--key", key, "data.sources.pairs.weight=0", "-o", tmp_path / "page.html") == 2
    assert "is never drawn" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_stored_size_of_an_image_stands_beside_the_shown_one(demo, tmp_path, xc_data):
    source = tmp_path / "source"
    write_tar(source / "a.tar", [*make_pairs(2), ("wide.png", make_image(300, 20)), ("wide.txt", b"a wide one")])
    assert xc_data("index", source, "--tokenizer", demo.tokenizer) == 0
    assert xc_data("merge", source) == 0
    config = write_stage(tmp_path / "c.yaml", demo, sources={"s": {"path": str(source)}}, global_batch=1)
    assert xc_data("preview", config, "-o", tmp_path / "page.html") == 0
    cards = re.findall(r"<article.*?</article>", (tmp_path / "page.html").read_text(), re.DOTALL)
    sizes = {re.search(r"<code>(.*?)</code>", c)[1]: re.search(r"(\d+ x \d+) &rarr; 64 x 64", c)[1] for c in cards}
    assert sizes == {"k0": "8 x 6", "k1": "9 x 6", "wide": "300 x 20"}


def test_the_first_lines_say_how_each_source_reads(config, tmp_path, xc_data):
    assert xc_data("preview", config, "--packs", 3, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    lines = html.unescape(re.sub(r"<[^>]*>", " ", page[page.index("How they read") : page.index('class="pack"')]))
    assert re.search(r"pairs\s+\d+ ×\s+<s>\s+image\s+words\s+</s>", lines)
    assert re.search(r"text\s+\d+ ×\s+<s>\s+words\s+</s>", lines)


def test_a_template_that_supervises_nothing_or_the_picture_is_seen_in_the_first_lines(config, tmp_path, xc_data, monkeypatch):
    def broken(*arguments):
        rendered = templates.render(*arguments)
        rendered.supervised[:] = False
        rendered.supervised[rendered.image_positions] = True
        return rendered

    monkeypatch.setattr(materialise, "render", broken)
    assert xc_data("preview", config, "--packs", 3, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    first_lines = page[page.index("How they read") : page.index('class="pack"')]
    assert '<span class="frame wrong">image</span>' in first_lines
    assert 'class="seen"' not in first_lines
    assert '<span class="why">0 predicted</span>' in page


tokens = st.lists(
    st.sampled_from([Token("text", "words", True), Token("image", "image", False), Token("special", "<s>", False)]), max_size=12
)


@given(tokens)
def test_a_folded_pattern_says_only_what_stands_there(drawn: list[Token]) -> None:
    at = 0
    for unit, repeats in fold(drawn):
        times = 0
        while tuple(drawn[at : at + len(unit)]) == unit and (times == 0 or repeats):
            at, times = at + len(unit), times + 1
        assert times >= (2 if repeats else 1)
    assert at == len(drawn)


def test_patterns_count_segments_by_source_and_leave_out_dropped_ones(config):
    data, viewer = opened(config)
    views = [viewer.view([pieces], [at])[1][0] for (at, pieces), _ in zip(walk(data.plan, START), range(6), strict=False)]
    found = patterns(views)
    assert sorted(found) == sorted({card.source for view in views for card in view.cards})
    for source, (shown, others) in found.items():
        total = sum(card.source == source for view in views for card in view.cards)
        assert sum(p.segments for p in shown) == total if not others else sum(p.segments for p in shown) < total
    card = views[0].cards[0]
    assert tokens_of(card)[0] == Token("special", "<s>", False)
    assert all(isinstance(part, Part) for part in card.parts)
