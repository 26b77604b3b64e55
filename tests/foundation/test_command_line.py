"""How commands end."""

from collections.abc import Callable

import pytest

from foundation.command_line import EXIT_INTERRUPTED, EXIT_USER_ERROR, exit_status


def _raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (_raising(ValueError("no")), EXIT_USER_ERROR, "error: no\n"),
        (_raising(FileNotFoundError(2, "not there", "a\nb")), EXIT_USER_ERROR, None),
        (_raising(KeyboardInterrupt()), EXIT_INTERRUPTED, "stopped\n"),
    ],
)
def test_what_is_foreseen_is_one_line(
    run: Callable[[], int | None],
    status: int,
    line: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a status."""
    assert exit_status(run, ValueError, interrupted="stopped") == status
    told = capsys.readouterr().err
    assert told == ("error: a\\nb: not there\n" if line is None else line)


def test_what_is_not_foreseen_is_raised() -> None:
    """A fault of the program keeps its traceback."""
    with pytest.raises(TypeError):
        exit_status(_raising(TypeError("x")), ValueError)
