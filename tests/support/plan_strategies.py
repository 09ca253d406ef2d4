"""Sources in memory and hypothesis strategies for the tests of `data_pipeline.plan`."""

from dataclasses import fields
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from data_pipeline.plan.columns import ELEMENT, Budgets, ImagePolicy
from data_pipeline.plan.plan import Plan, Window
from data_pipeline.plan.split import Pieces

POLICY = ImagePolicy(tokens=16)
BUDGETS = Budgets(tokens=64, images=3, segments=5)


class ArraySource:
    """A PlanSource over arrays: rows lie in blocks of `block_rows` rows, and `keep` says which are kept."""

    def __init__(self, name: str, counts: np.ndarray, elements: np.ndarray, keep: np.ndarray | None = None, block_rows: int = 250) -> None:
        keep = np.ones(len(counts), bool) if keep is None else keep
        self.name, self.digest = name, f"digest of {name}"
        self.rows = np.flatnonzero(keep)
        borders = np.append(np.arange(0, len(counts), block_rows), len(counts))
        self.block_starts = np.searchsorted(self.rows, borders).astype(np.int64)
        self._counts, self._elements = counts.astype(np.int64), elements
        self._starts = np.cumsum(self._counts) - self._counts
        kept_elements = self.elements(self.rows)[1]
        self.text_tokens = int(kept_elements["tokens"].sum())
        self.images = int((kept_elements["width"] > 0).sum())

    def kept(self, first: int, last: int) -> np.ndarray:
        return self.rows[first:last]

    def kept_runs(self, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return np.concatenate([self.rows[first:end] for first, end in zip(firsts, ends, strict=True)])

    def elements(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = self._counts[rows]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, self._elements[np.repeat(self._starts[rows], counts) + within]


def element_records(lengths: list[int]) -> np.ndarray:
    """ELEMENT records: a length >= 0 is a text of that many tokens, -1 an image."""
    records = np.zeros(len(lengths), ELEMENT)
    for record, length in zip(records, lengths, strict=True):
        if length >= 0:
            record["tokens"] = length
        else:
            record["width"], record["height"] = 640, 480
    return records


def source_of(name: str, samples: list[list[int]], keep: list[bool] | None = None, block_rows: int = 4) -> ArraySource:
    """A source from one list of element lengths a sample."""
    flat = element_records([length for sample in samples for length in sample])
    mask = None if keep is None else np.array(keep, bool)
    return ArraySource(name, np.array([len(sample) for sample in samples], np.int64), flat, mask, block_rows)


def text_source(name: str, samples: int, keep: np.ndarray | None = None, block_rows: int = 250) -> ArraySource:
    """A large source of one-token texts, for tests of order and mix."""
    records = np.zeros(samples, ELEMENT)
    records["tokens"] = 1
    return ArraySource(name, np.ones(samples, np.int64), records, keep, block_rows)


def peers_mix(samples: int, seed: int = 0) -> ArraySource:
    """The mix of facts/data_peers.md: 70 % captions of about 1260 tokens, 30 % documents of 1 to 3 images of 1225 tokens."""
    draw = np.random.RandomState(seed)
    caption = draw.rand(samples) < 0.7
    images = np.where(caption, 1, draw.randint(1, 4, samples))
    counts = np.where(caption, 2, 2 * images + 1)
    first = np.cumsum(counts) - counts
    place = np.arange(counts.sum()) - np.repeat(first, counts)
    is_image = np.where(np.repeat(caption, counts), place == 0, place % 2 == 1)
    records = np.zeros(len(place), ELEMENT)
    texts = np.where(np.repeat(caption, counts), draw.poisson(35, len(place)), draw.exponential(200, len(place)).astype(int))
    records["tokens"] = np.where(is_image, 0, texts)
    records["width"] = np.where(is_image, 640, 0)
    records["height"] = np.where(is_image, 480, 0)
    return ArraySource("peers", counts, records)


lengths = st.one_of(st.just(-1), st.integers(0, 30), st.integers(0, 200))
samples = st.lists(lengths, max_size=8)


@st.composite
def sources(draw: st.DrawFn, name: str = "source") -> ArraySource:
    """A small source, some of whose samples are not kept; at least one is."""
    held = draw(st.lists(st.tuples(samples, st.booleans()), min_size=1, max_size=40))
    keep = [kept for _, kept in held]
    keep[draw(st.integers(0, len(keep) - 1))] = True
    return source_of(name, [sample for sample, _ in held], keep, block_rows=draw(st.integers(1, 9)))


@st.composite
def epoch_plans(draw: st.DrawFn) -> tuple[Plan, list[ArraySource], list[Fraction]]:
    """A plan over one to three small sources for whole or broken numbers of epochs."""
    held = [draw(sources(name)) for name in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))]
    weights = [Fraction(draw(st.integers(2, 6)), 2) for _ in held]
    weights[0] = max(weights[0], Fraction(1))
    plan = Plan(
        held,
        weights,
        "epochs",
        BUDGETS,
        POLICY,
        [draw(st.integers(0, 4)) for _ in held],
        window=draw(st.integers(1, 60)),
        global_batch=draw(st.integers(1, 7)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return plan, held, weights


def raw(pieces: Pieces) -> list[bytes]:
    """All columns, to compare."""
    return [getattr(pieces, f.name).tobytes() for f in fields(Pieces)]


def packs_of(window: Window) -> list[list[bytes]]:
    """All columns of each pack of a window."""
    return [raw(window.pack(i)) for i in range(len(window))]
