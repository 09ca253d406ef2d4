"""What the four console commands have in common: how they take their words, and how they end.

Invariant: a user error is one line on stderr and its exit code, Ctrl-C one line and its signal, never a traceback; nothing here imports
more than the errors.
"""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence

from data_pipeline.errors import EXIT_DONE, EXIT_USER, STORAGE_ERRORS, TryAgainError, UserError

_FOR_THE_USER = (*STORAGE_ERRORS, errno.ENAMETOOLONG)
"""The last is what pathlib raises of a path that is only asked whether it is there."""


def command_line(run: Callable[[], int]) -> int:
    """Runs a command, turning its user errors into one line and their exit code."""
    try:
        return run()
    except (UserError, TryAgainError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_DONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.excepthook = lambda *_: None
        raise  # so that Python ends of SIGINT, and a shell's loop with it
    except OSError as error:
        if error.errno not in _FOR_THE_USER:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(
            f"error: {error.filename or 'cannot write'}: {error.strerror} ({'free space' if full else 'check the path'})", file=sys.stderr
        )
        return EXIT_USER


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, words: str) -> argparse.Namespace:
    """The arguments of a command whose list `words` takes every word, also those behind an option, which argparse leaves over."""
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, words):
        getattr(args, words).extend(r for r in rest if not r.startswith("-"))
        rest = [r for r in rest if r.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
