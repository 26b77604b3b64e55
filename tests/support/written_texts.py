"""What `python -m model.generate` prints."""

import pytest

from model.generate import main


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def printed_ids(text: str) -> list[list[int]]:
    """The lines that --ids adds."""
    return [list(map(int, line.split()[1:])) for line in text.splitlines() if line[:4] == "ids:"]
