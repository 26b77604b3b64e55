"""Errors for input data and shard sets, and how a command ends with one.

A message names the value, the rule and what to do.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_ERROR = 1
EXIT_BAD_RECORDS = 3
EXIT_INTERRUPTED = 130
_LONGEST_LINE = 1600
# What a terminal would act on, or could not show at all.
_NOT_SHOWN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DataError(Exception):
    """Input that cannot be read, or a shard set that cannot be trained on."""


class BadRecordsError(DataError):
    """More records are bad than the limit allows; all others are on disk, and nothing is lost."""


def run_command(run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command: its errors become one line each on standard error, and an exit status.

    Args:
        run: The command; gives its exit status.
        interrupted: The line after Ctrl-C.
    """
    try:
        return run()
    except DataError as error:
        print_error(error)
        return EXIT_BAD_RECORDS if isinstance(error, BadRecordsError) else EXIT_ERROR
    except BrokenPipeError:
        # The reader, such as `head`, has enough; nothing more can be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        print_error(explain(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED


def explain(error: OSError) -> DataError:
    """An error of the system that no message of ours foresees: a folder deleted meanwhile, say."""
    path = (
        shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else "a file"
    )
    return DataError(
        f"{path}: {error.strerror or error}; check that it is there, its name and its permissions, "
        "and run the same command again"
    )


def print_error(error: DataError) -> None:
    """Print the lines of an error, without what a terminal would act on."""
    for line in printable(str(error)).splitlines():
        kept = _LONGEST_LINE // 2
        cut = line if len(line) <= _LONGEST_LINE else f"{line[:kept]}...{line[-kept:]}"
        print(f"error: {cut}", file=sys.stderr)


def printable(text: str) -> str:
    """A text with line ends, but without other control characters and halves of characters."""
    return _NOT_SHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(path: Path | str) -> str:
    """A path in one line: as it is, or with the escapes of Python where it cannot be shown."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
