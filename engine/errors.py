"""Errors that a user can fix end in one line; all others keep their traceback."""

import contextlib
import os
import re
import sys
from pathlib import Path

NO_MEMORY = "out of memory|can't allocate memory|bad_alloc|ALLOC_FAILED"  # PyTorch has a class for the first only


def counted(number, noun):
    """1 epoch, 2 epochs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class UserError(ValueError):
    """What was asked for cannot be done; the message gives what was found, what is accepted and what to do."""


@contextlib.contextmanager
def as_user_error(*kinds):
    """Turn errors of these kinds in the block, such as OSError, into UserErrors."""
    try:
        yield
    except BrokenPipeError:  # of what reads our output, no file
        raise
    except kinds as error:
        raise UserError(error) from error


@contextlib.contextmanager
def exit_in_one_line():
    """End the program with one line: exit code 2 where a user can mend it, 1 if memory was refused or
    our output is no longer read, 130 for Ctrl-C.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output has seen enough: head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left as it ends
        sys.exit(1)
    except KeyboardInterrupt:  # while there is nothing to save: an open run notes signals
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        sys.exit(
            f"Out of memory{f' ({wanted[1]} more were asked for)' if wanted else ''}. Use a smaller "
            f"--max_device_batch_size or a smaller model."
        )
