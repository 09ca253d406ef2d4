"""`xc-compose`: talk to a trained model, collect pictures, and have it write articles with them.

Invariant: whatever can be known without a model's weights (its stage, the length of a question, the data) is refused before they are
read; every refusal is one line with exit code 2.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_pipeline.command_line import command_line
from data_pipeline.errors import EXIT_DONE, UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    sys.exit(command_line(lambda: args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-compose",
        description="Talk to a trained model about pictures, and have it write articles with pictures out of a collection.",
        epilog="After make demo: xc-compose chat runs/demo/sft --ask 'what is this? PICTURE'",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = commands.add_parser("chat", help="talk to a model in the terminal", description=_CHAT)
    _add_checkpoint(chat)
    chat.add_argument("--ask", metavar="LINE", help="ask this, print the answer, and end")
    _add_sampling(chat, max_tokens=256, temperature=0.0)
    chat.set_defaults(run=_chat)

    collection = commands.add_parser("collection", help="make a collection of pictures for articles", description=_COLLECTION)
    actions = collection.add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="collect the pictures of a folder or of a source of pairs", description=_COLLECTION)
    build.add_argument("origin", type=Path, metavar="FOLDER|SOURCE", help="a folder with pictures, or an indexed source of pairs")
    build.add_argument("-o", "--output", type=Path, required=True, metavar="C", help="the collection, a folder; must not exist")
    build.add_argument(
        "--model", type=Path, metavar="CHECKPOINT", help="a trained model that looks at the pictures, to find them by a picture as well"
    )
    build.set_defaults(run=_build)
    search = actions.add_parser("search", help="what a text or a picture finds", description=_SEARCH)
    search.add_argument("collection", type=Path, metavar="C", help="the collection")
    wanted = search.add_mutually_exclusive_group(required=True)
    wanted.add_argument("text", nargs="?", metavar="TEXT", help="nearest captions")
    wanted.add_argument("--image", metavar="FILE", help="pictures that look like it to the model that collection build --model named")
    search.add_argument("--count", type=_positive, default=8, metavar="N", help="pictures at most (default %(default)s)")
    search.set_defaults(run=_search)

    article = commands.add_parser("article", help="write an article with pictures", description=_ARTICLE)
    _add_checkpoint(article)
    article.add_argument("--instruction", required=True, metavar="TEXT", help="what to write about, and how")
    article.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures that the model sees while it writes; a .txt beside one says what it is",
    )
    article.add_argument("--collection", type=Path, metavar="C", help="where its pictures come from; --images themselves by default")
    article.add_argument("--pictures", type=_positive, default=3, metavar="N", help="pictures at most (default %(default)s)")
    article.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html", help="the page; FILE.json goes beside it")
    _add_sampling(article, max_tokens=768, temperature=0.7)
    article.set_defaults(run=_article)

    suite = commands.add_parser(
        "eval", help="ask a model questions with known answers", description=_EVAL, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_checkpoint(suite)
    suite.add_argument("--suite", required=True, choices=("captions", "text", "choices", "composition"), help="which questions")
    suite.add_argument(
        "--data", type=Path, metavar="PATH", help="where they are; captions and text: by default what the run's config names"
    )
    suite.add_argument(
        "--base", type=Path, metavar="CHECKPOINT", help="text: the model to compare with (default: what the stage began from)"
    )
    suite.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="the tables as JSON; FILE.md goes beside it")
    suite.set_defaults(run=_eval)
    return parser


_COLLECTION = """Captions are embedded (WordLlama: averaged word vectors, English mainly, from its package, nothing is downloaded) and kept
in a LanceDB table on disk, which is searched from disk. The pictures stay where they are. A source's captions are its texts; a file's is
the text of the .txt beside it, or else what its name says. With --model, the mean of each picture's image tokens is kept beside it."""
_SEARCH = """A line a picture, the nearest first: cosine, name, caption. --image asks the model that looked at the collection when it was
built (collection build --model), which must still have the same weights."""
_ARTICLE = """The paper's five steps: the model writes, chooses lines that a picture fits, writes a caption for each, is shown four
pictures that the captions find, and chooses. FILE.json keeps every question, its answer, and what was done where an answer did not fit.
Needs a model that was trained to follow instructions: stage sft or compose."""
_EVAL = """Prints tables in Markdown; each figure stands beside what guessing, or the base model, would give.

  captions     held-out pairs with candidates.json: loss of the captions behind the right picture, a wrong one and none; which of ten
               captions a picture makes likeliest (summed over its words); which of ten pictures makes a caption likeliest
  text         held-out plain text: the loss, and its change against the base model
  choices      questions in a JSONL, one a line: the likeliest letter. As in MMBench: index, question, hint, A, B, C, D, answer, category,
               image (base64, or a file beside the JSONL); or as in SEED-Bench: question_id, question, choice_a ... choice_d, answer,
               question_type_id, data_id (a file beside the JSONL)
  composition  documents (OBELICS): the lines that their pictures follow, and the right caption and picture among those of three other
               documents; a short line right behind a picture is its caption

  xc-compose eval runs/demo/sft --suite captions
  xc-compose eval runs/demo/sft --suite text --base runs/demo/language
  xc-compose eval hub/my-xcomposer2 --suite choices --data mmbench_dev.jsonl -o mmbench.json
  xc-compose eval runs/small/compose --suite composition --data runs/small/data/heldout/documents"""
_CHAT = """A line is a turn; the path of a picture in it (jpg, png, webp; quoted if it has blanks) stands for the picture. Brackets and
commas around it are words of the line. The conversation is laid out as in the training data, with the turn tokens that the model's
vocabulary has. Without a terminal, lines are read from standard input. /new forgets what was said."""


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a run directory, RUN/checkpoints/step-N, or a folder that xc-train export wrote",
    )


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int, temperature: float) -> None:
    parser.add_argument("--max-tokens", type=_positive, default=max_tokens, metavar="N", help="longest answer (default %(default)s)")
    parser.add_argument(
        "--temperature", type=_temperature, default=temperature, metavar="X", help="0 = always the likeliest word (default %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=_share, default=0.95, metavar="X", help="share of the likeliest words that are drawn from (default %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="seed of what is drawn (default %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on, below 2^63")
    return int(text)


def _temperature(text: str) -> float:
    value = _number(text)
    if value != 0 and not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature (give 0, or 0.01 to 100)")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share (give a number above 0, up to 1)")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _chat(args: argparse.Namespace) -> int:
    from compose import assistant, chat
    from train.generate import Sampling

    prompter = assistant.prompter(args.checkpoint)
    if args.ask is not None:
        if not args.ask.strip():
            raise UserError("--ask is empty (ask something)")
        prompter.room(assistant.ask(*chat.parts(args.ask)))
    if not prompter.obeys:
        what = f"{args.checkpoint} is of stage {prompter.stage.value}, which teaches no conversation"
        print(f"note: {what}: it may go on where it should answer", file=sys.stderr)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    conversation = chat.Chat(assistant.load(args.checkpoint), args.max_tokens, sampling)
    if args.ask is not None:
        chat.ask_once(conversation, args.ask)
    else:
        chat.converse(conversation)
    return EXIT_DONE


def _build(args: argparse.Namespace) -> int:
    from compose import collection

    built = collection.build(args.origin, args.output, args.model)
    left_out = f", {built.unreadable} unreadable ones left out" if built.unreadable else ""
    print(f"{args.output}: {built.pictures} pictures{left_out}")
    print(f"next: xc-compose collection search {args.output} TEXT")
    return EXIT_DONE


def _search(args: argparse.Namespace) -> int:
    from compose import collection, pictures

    found = collection.Collection(args.collection)
    if args.image is not None:
        (picture,) = pictures.read([args.image])
        entries = found.like(picture, args.count)
    else:
        entries = found.search(args.text, args.count)
    for entry in entries:
        print(f"{entry.likeness:5.2f}  {entry.name}  {entry.caption}")
    return EXIT_DONE


def _article(args: argparse.Namespace) -> int:
    from compose import assistant, collection, pictures, prompts
    from compose.article import CANDIDATES, compose
    from compose.page import check_output, write
    from train.generate import Sampling

    if not args.instruction.strip():
        raise UserError("--instruction is empty (say what to write about)")
    record = check_output(args.output)
    references = pictures.read_told(args.images)
    find = None
    if args.collection:
        found = collection.Collection(args.collection)
        found.require_pictures()
        find = lambda text, used: found.retrieve(text, CANDIDATES, used)  # noqa: E731
    elif references:
        find = collection.among(references, CANDIDATES)
    prompter = assistant.prompter(args.checkpoint)
    prompter.require_obedience()
    prompter.room(assistant.ask(*prompts.write(args.instruction, references)))
    writer = assistant.load(args.checkpoint)
    most = args.pictures if args.collection else min(args.pictures, len(references))
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    tell = partial(print, file=sys.stderr, flush=True)
    article = compose(writer, args.instruction, references, find, most, args.max_tokens, sampling, tell)
    facts = {"checkpoint": str(args.checkpoint), "weights": writer.weights, "stage": writer.stage.value}
    facts |= {"collection": str(args.collection) if args.collection else None, "images": args.images}
    facts |= {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    write(article, facts, args.output, record)
    replaced = sum(step.fallback is not None for step in article.steps)
    print(f"{len(article.lines)} paragraphs, {len(article.pictures)} pictures; {replaced} of {len(article.steps)} steps carry a remark")
    print(f"steps: {record}")
    print(f"open {args.output.resolve()}")
    return EXIT_DONE


def _eval(args: argparse.Namespace) -> int:
    from compose import suites

    suites.check_output(args.output)
    result = suites.run(args.suite, args.checkpoint, args.data, args.base)
    print(result.markdown(), end="")
    if args.output:
        suites.write(result, args.output)
        print(f"\n{args.output}")
    return EXIT_DONE


if __name__ == "__main__":
    main()
