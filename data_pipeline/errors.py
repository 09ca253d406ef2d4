"""The two kinds of failure that reach a user: a mistake that they can mend, and a cause that may pass.

Everything a user can mend is raised as `UserError`, whose text says what is wrong, where, and the cure; command lines print it
as one line and exit with its code.
"""

import errno

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER = 2
EXIT_NEEDS_PERSON = 70
EXIT_TRY_AGAIN = 75

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""What a file system says and the user mends: by making room, or by rights."""


class UserError(Exception):
    """A mistake in input or configuration. The message is one line: what, where, cure."""

    exit_code = EXIT_USER


class TryAgainError(Exception):
    """A cause outside the run that may pass (network, deadline); nothing was lost and the same command goes on."""

    exit_code = EXIT_TRY_AGAIN


def cannot_read(path: object, error: OSError) -> TryAgainError:
    """What a reader raises where the file system failed: nothing is known of the data, and the failure may pass."""
    return TryAgainError(f"cannot read {path}: {error.strerror or error} (mend the file system or its rights, then run the same again)")
