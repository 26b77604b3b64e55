"""Who may write to an output at the same time."""

import errno
import fcntl
from pathlib import Path

import pytest

from data_prep.building.output_lock import writing
from data_prep.errors import DataError
from tests.data_prep.conftest import Silence


class Listener(Silence):
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        """Keep a message."""
        self.messages.append(message)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder with a journal."""
    (tmp_path / "journal").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_only_array_tasks_share_an_output(
    output: Path, first: bool, second: bool, allowed: bool
) -> None:
    """A build alone keeps everything out; tasks of an array let each other in."""
    with writing(output, first, Silence()):
        if allowed:
            with writing(output, second, Silence()):
                pass
        else:
            with (
                pytest.raises(DataError, match="another process is writing"),
                writing(output, second, Silence()),
            ):
                pass
    with writing(output, second, Silence()):
        pass


def test_a_file_system_without_locks_is_said(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not exist the build goes on with a note instead of failing."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    listener = Listener()
    with writing(output, False, listener):
        pass
    assert "no locks" in listener.messages[0]
