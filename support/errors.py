"""The one kind of mistake that a user can mend: one clear sentence, and no traceback."""

import contextlib
import sys
from concurrent.futures import BrokenExecutor


class UserError(Exception):
    """What is wrong, where, and what to do about it. Of a longer message the first line is kept."""

    def __init__(self, message):
        super().__init__(str(message).partition("\n")[0])


# A full disk, a missing folder or a worker that was killed is the user's to mend, too.
MENDABLE = (UserError, OSError, BrokenExecutor)


def print_any_path():
    """A path may hold bytes that are no text: they are printed escaped."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def one_sentence(script):
    """End the program with `script: what is wrong` if the user can mend what is raised inside."""
    print_any_path()
    try:
        yield
    except MENDABLE as error:
        first_line = str(error).split("\n")[0]
        raise SystemExit(f"{script}: {first_line}") from error
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: stopped") from None
