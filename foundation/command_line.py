"""How a command ends: with a status, and with one line for each error that it foresees."""

import sys
from collections.abc import Callable

from foundation.shown_text import told

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


def exit_status(
    run: Callable[[], int | None],
    *errors: type[Exception],
    failed: int = EXIT_USER_ERROR,
    interrupted: str = "interrupted",
) -> int:
    """Run a command.

    Args:
        run: the command; gives its status, None for 0.
        errors: that become a line on standard error, beside those of the system.
        failed: status after one of them.
        interrupted: the line after Ctrl-C.
    """
    try:
        return run() or 0
    except errors as error:
        print(f"error: {error}", file=sys.stderr)
        return failed
    except OSError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
