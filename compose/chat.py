"""A conversation in the terminal: a line is a turn, and the path of a picture in it stands for the picture.

Invariant: a mistake in a line costs that line, never the conversation.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator

from compose import pictures, prompts
from compose.assistant import Assistant, Parts, Turn
from data_pipeline.errors import UserError
from data_pipeline.samples import Role
from train.generate import Sampling

_ENDING = rf"(?:{'|'.join(re.escape(e) for e in pictures.EXTENSIONS)})"
_LONGEST = 1024
"""Characters of a path: a long line is not read to its end from each of its quotes."""
_QUOTED = rf"""(?<!\w)(?P<quote>["'])(?P<quoted>(?:(?!(?P=quote)).|(?<=\w)(?=(?P=quote))'(?=\w)){{1,{_LONGEST}}}?{_ENDING})(?P=quote)"""
"""Between quotes; neither begins nor ends with the apostrophe of a word (`what's in 'my dog's photo.png'?`)."""
_WIDE = r"""\s（［「『《【、，。；：！？"""
_AROUND = rf"""{_WIDE}"'“”‘’(\[{{<>,;:!?"""
_PLAIN = rf"""(?<![^{_AROUND}])(?P<plain>[^{_AROUND}][^{_WIDE}]{{0,{_LONGEST}}}?{_ENDING})(?!\.?[^\W\u2e80-\U0010ffff])"""
"""Up to a blank, a Chinese, Japanese or Korean letter or mark, or what no name begins with: what is around it are words of the line."""
_PATH = re.compile(f"{_QUOTED}|{_PLAIN}", re.I)

WELCOME = "Paths of pictures in a line are pictures (quote a path with blanks). /new forgets what was said; Ctrl-D ends."


def parts(line: str) -> Parts:
    """The words and pictures of a line, in order.

    Raises:
        UserError: a path that leads to no picture.
    """
    return list(_parts(line))


def _parts(line: str) -> Iterator[str | pictures.Picture]:
    begin = 0
    for found in _PATH.finditer(line):
        if line[begin : found.start()].strip():
            yield line[begin : found.start()]
        path = os.path.expanduser(found["quoted"] or found["plain"])  # noqa: PTH111  which leaves `~nobody.png` as it is
        yield pictures.read([path])[0]
        begin = found.end()
    if line[begin:].strip():
        yield line[begin:]


class Chat:
    """What was said so far."""

    def __init__(self, assistant: Assistant, max_tokens: int, sampling: Sampling) -> None:
        self.assistant, self.max_tokens, self.sampling = assistant, max_tokens, sampling
        self.turns: list[Turn] = []

    def say(self, line: str, hear: Callable[[str], None] | None = None) -> tuple[str, str]:
        """The answer to a line, and a remark about it, empty as a rule. `hear` as that of `Assistant.answer`.

        Raises:
            UserError: as `parts` and `Assistant.answer` do; nothing was said then.
        """
        turns = [*self.turns, Turn(Role.user, parts(line))]
        reserved = min(self.max_tokens, self.assistant.context // 2)
        while len(turns) > 1 and self.assistant.length(turns) + reserved > self.assistant.context:
            turns = turns[2:]
        said = self.assistant.answer(turns, self.max_tokens, self.sampling, hear)
        forgotten = (len(self.turns) + 1 - len(turns)) // 2
        self.turns = [*turns, Turn(Role.assistant, [said.text])]
        remarks = [] if said.whole else [prompts.CUT_OFF]
        remarks += [f"{forgotten} earlier turns no longer fit and were forgotten"] if forgotten else []
        return said.text, "; ".join(remarks)


def ask_once(chat: Chat, line: str) -> None:
    """One question; the answer goes to stdout as it is written, remarks to stderr."""
    _, remark = chat.say(line, lambda words: print(words, end="", flush=True))
    print()
    if remark:
        print(f"({remark})", file=sys.stderr)


def converse(chat: Chat) -> None:
    """Until the end of input."""
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused with their line
    if interactive:
        import readline  # noqa: F401  input() then edits and remembers lines

        print(WELCOME, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/new":
            chat.turns = []
        elif line:
            try:
                ask_once(chat, line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(flush=True)
                print("(not answered)", file=sys.stderr)
