"""The command that serves an export: its options, its lines, and how it stops."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from foundation.command_line import EXIT_USER_ERROR
from model.serve import main
from model.serving.running import listen

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "5"], "--heads 5, but this export has 4; use 1 to 4"),
        (["--port", "70000"], "--port 70000 must be from 0 to 65535"),
        (["--max-batch", "0"], "--max-batch 0 must be from 1 to"),
        (["--queue", "-1"], "--queue -1 must be from 0 to"),
        (["--max-model-len", "1"], "--max-model-len 1 must be from 2 to"),
        (["--grace", "nan"], "--grace nan must be from 0 to"),
        (["--api-key", "a b"], "--api-key or HEADWAY_API_KEY must be letters"),
        (["--api-key", ""], "--api-key or HEADWAY_API_KEY must be letters"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 8000 cannot be listened on"),
    ],
)
def test_mistakes_are_one_line(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """A value out of range is named with its rule and what to do."""
    assert main([str(export), *arguments]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {words}")
    assert captured.err.count("\n") == 1


def test_a_port_in_use_is_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At once, before the model is loaded."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main([str(export), "--port", str(port)]) == EXIT_USER_ERROR
    assert "cannot be listened on" in capsys.readouterr().err


@pytest.fixture
def process(export: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, as a person starts it."""
    command = [sys.executable, "-m", "model.serve", str(export), "--port", "0"]
    command += ["--max-model-len", "4000", "--max-batch", "2", "--grace", "100"]
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def test_sigterm_finishes_what_runs(process: "subprocess.Popen[str]") -> None:
    """Texts that run end as they would; new clients are refused; the exit status is 0."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("serving tiny (4 heads) at http://127.0.0.1:")
    client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0, timeout=200)
    stream = client.completions.create(
        model="tiny", prompt="ab", max_tokens=800, temperature=0, stream=True
    )
    parts = [next(stream)]
    process.send_signal(signal.SIGTERM)
    parts += list(stream)
    assert parts[-1].choices[0].finish_reason in ("length", "stop")
    assert process.wait(60) == 0
    assert process.stdout.read() == "stopped\n"
    assert process.stderr.read().startswith("note: --max-model-len 4000 passes position 64")
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    assert json.loads(parts[0].model_dump_json())["object"] == "text_completion"
