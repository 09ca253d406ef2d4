"""The pages in a real browser: nothing is loaded from anywhere, pictures decode, the search finds, narrow windows fit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, browser
from stage_yaml import write_stage

WIDTHS = (400, 1300)
SHOWN = "[...document.querySelectorAll('.card:not([hidden]) code')].map(c => c.textContent)"
DECODED = "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth))))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> Path:
    return write_stage(tmp_path_factory.mktemp("pages") / "demo.yaml", demo, window=1000)


@pytest.fixture(scope="module")
def preview(config, xc_data) -> Path:
    page = config.with_name("preview.html")
    assert xc_data("preview", config, "--packs", 6, "-o", page) == 0
    return page


@pytest.fixture(scope="module")
def simulated(config, xc_data) -> Path:
    page = config.with_name("simulate.html")
    assert xc_data("simulate", config, "--world", 3, "-o", page) == 0
    return page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_quietly(chromium: Page, page: Path, width: int) -> None:
    """Opens a page that must ask for nothing but itself and throw nothing."""
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.open(page, width)
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.errors == []
    assert chromium.run(OVERFLOW) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_the_preview_decodes_its_pictures_and_loads_nothing(preview, chromium, width):
    open_quietly(chromium, preview, width)
    sizes = chromium.run(DECODED)
    assert len(sizes) > 20
    assert set(sizes) == {64}
    assert chromium.requests == [preview.resolve().as_uri()]


def test_the_search_leaves_the_cards_that_hold_the_words(preview, chromium):
    open_quietly(chromium, preview, 1300)
    keys = chromium.run(SHOWN)
    wanted = keys[5]
    chromium.type_into("#find", wanted.upper())
    assert chromium.run(SHOWN) == [key for key in keys if wanted in key]
    assert chromium.run("document.querySelectorAll('.bar a:not(.off)').length") == sum(wanted in key for key in keys)
    chromium.type_into("#find", "train-000001.tar")
    assert 0 < len(chromium.run(SHOWN)) < len(keys)
    chromium.type_into("#find", "nothing has these words")
    assert chromium.run(SHOWN) == []
    assert chromium.run("document.getElementById('none').hidden") is False
    chromium.type_into("#find", " ")
    assert chromium.run(SHOWN) == keys


def test_a_source_can_be_taken_out_of_sight(preview, chromium):
    open_quietly(chromium, preview, 1300)
    sources = set(chromium.run("[...document.querySelectorAll('.card')].map(c => c.dataset.source)"))
    chromium.run("document.querySelector('.chip input').click()")
    left = set(chromium.run("[...document.querySelectorAll('.card:not([hidden])')].map(c => c.dataset.source)"))
    assert left == sources - {"0"}


def test_a_picture_grows_when_it_is_clicked(preview, chromium):
    open_quietly(chromium, preview, 1300)
    width = "document.querySelector('figure img').getBoundingClientRect().width"
    before = chromium.run(width)
    chromium.run("document.querySelector('figure img').click()")
    assert chromium.run(width) > before


def test_the_page_of_a_key_opens_where_the_sample_is(config, preview, xc_data, chromium):
    open_quietly(chromium, preview, 1300)
    key = chromium.run(SHOWN)[-1]
    page = config.with_name("key.html")
    assert xc_data("preview", config, "--key", key, "-o", page) == 0
    open_quietly(chromium, page, 1300)
    box = "(() => { const b = document.querySelector('.asked').getBoundingClientRect(); return [b.top, b.bottom, innerHeight]; })()"
    top, bottom, height = chromium.run(box)
    assert 0 <= top < bottom <= height
    assert chromium.run("document.querySelector('.asked code').textContent") == key


@pytest.mark.parametrize("width", WIDTHS)
def test_the_simulation_draws_its_curves_and_says_their_values(simulated, chromium, width):
    open_quietly(chromium, simulated, width)
    plots = chromium.run(
        "[...document.querySelectorAll('.plot')].map(p => { const b = p.getBoundingClientRect(); return [b.width, b.height]; })"
    )
    assert len(plots) == 8
    assert all(w > 200 and h > 100 for w, h in plots)
    lengths = chromium.run("[...document.querySelectorAll('path.bold')].map(p => p.getTotalLength())")
    assert len(lengths) >= 8
    assert min(lengths) > 100
    chromium.run("document.querySelector('.plot').scrollIntoView({block: 'center'})")
    x, y = chromium.run(
        "(() => { const b = document.querySelector('.plot').getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    chromium.move_to(x, y)
    told = chromium.run("document.getElementById('tip')?.textContent")
    assert told.startswith("step ")
    assert "of the context" in told
    assert chromium.run(OVERFLOW) == 0
