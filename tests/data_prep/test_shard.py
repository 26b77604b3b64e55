"""The command line of the shard builder."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import verify
from data_prep.shard import main
from data_prep.shards.manifest import load_manifest
from data_prep.tokenization.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "data_prep" / "shard.py"
Write = Callable[..., Path]


def run(
    *arguments: str, cwd: Path, file_limit: int | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder, if asked with a limit on the size of any file it writes."""

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, preexec_fn=limit,
    )  # fmt: skip


def test_it_runs_by_path_from_anywhere(
    tmp_path: Path, texts: list[str], write_jsonl: Write
) -> None:
    """From another folder, not installed, with two workers: exit 0, rates on standard error."""
    write_jsonl(texts, "deep/corpus.jsonl")
    done = run(
        str(SCRIPT), "--input", "corpus.jsonl", "--output", "out", "--tokenizer", "bytes",
        "--workers", "2", "--unit-bytes", "4000", cwd=tmp_path / "deep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "300 records = 300 documents + 0 empty + 0 rejects" in done.stdout
    assert "MB/s" in done.stderr
    assert "tokens/s" in done.stderr
    assert load_manifest(tmp_path / "deep" / "out").totals.documents == 300


def test_it_runs_as_a_module(tmp_path: Path, write_jsonl: Write) -> None:
    """`python -m data_prep.shard` is the same command, and says when there is nothing to do."""
    path = write_jsonl(["a"])
    command = (
        "-m", "data_prep.shard", "--input", str(path), "--output", str(tmp_path / "out"),
        "--tokenizer", "bytes",
    )  # fmt: skip
    assert run(*command, cwd=ROOT).returncode == 0
    again = run(*command, cwd=ROOT)
    assert again.returncode == 0
    assert "left as it is" in again.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_gives_one_line(
    tmp_path: Path, texts: list[str], write_jsonl: Write, workers: str
) -> None:
    """A write that the system refuses ends the command with the path, no traceback, no set."""
    path = write_jsonl(texts)
    arguments = (
        str(SCRIPT), "--input", str(path), "--output", str(tmp_path / "out"), "--tokenizer",
        "bytes", "--workers", workers, "--unit-bytes", "30000", "--validation-fraction", "0",
    )  # fmt: skip
    done = run(*arguments, cwd=tmp_path, file_limit=20_000)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write ")
    assert ".arrow: File too large" in done.stderr
    assert not list((tmp_path / "out").rglob("*.arrow*"))
    assert run(*arguments, cwd=tmp_path).returncode == 0


def _take_interrupts() -> None:
    """As at a terminal: background jobs, as these tests may be, are started with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt_a_starting_worker(pid: int) -> bool:
    """Send Ctrl-C to a worker whose Python has its handler of it, but has not run our code yet."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        process = Path("/proc", child)
        caught = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())
        assert caught is not None
        if b"spawn_main" in (process / "cmdline").read_bytes() and int(caught[1], 16) & 0b10:
            os.kill(int(child), signal.SIGINT)
            time.sleep(0.2)  # a worker that minds it says so before the command can end it
            return True
    return False


@pytest.mark.parametrize(
    "moment", [pytest.param("while workers start", marks=pytest.mark.stress), "while they work"]
)
def test_an_interrupt_stops_at_once(
    tmp_path: Path, large_texts: list[str], write_jsonl: Write, moment: str
) -> None:
    """Ctrl-C ends the command and its workers with one line, and the next run finishes the set."""
    path = write_jsonl(large_texts)
    command = [
        sys.executable, str(SCRIPT), "--input", str(path), "--output", str(tmp_path / "out"),
        "--tokenizer", "train:500", "--workers", "2", "--unit-bytes", "16384",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        preexec_fn=_take_interrupts,
    )
    assert process.stderr is not None
    reached = {
        "while workers start": lambda: _interrupt_a_starting_worker(process.pid),
        "while they work": lambda: any((tmp_path / "out").glob("journal/00*.json")),
    }[moment]
    while not reached():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.stderr.read()
    assert process.wait(10) == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("interrupted; run the same command again")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(command[2:]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokenizer", "train:many"), "train:8192"),
        (("--tokenizer", "nowhere.json"), "No such file"),
        (("--tokenizer", "bytes", "--validation-fraction", "1.5"), "[0, 1)"),
        (("--tokenizer", "bytes", "--workers", "0"), "--workers 0"),
        (("--tokenizer", "bytes", "--eos-token", "<x>"), "not in the vocabulary"),
        (("--tokenizer", "bytes", "--source", "../x"), "--source"),
    ],
)
def test_wrong_options_give_one_line(
    tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    """Each wrong option is exit status 1 and a single line, with no output folder made."""
    path = write_jsonl(["a"])
    assert main(["--input", str(path), "--output", str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_two_builds_do_not_share_a_folder(
    tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """While another process holds the output, a second build is refused."""
    path = write_jsonl(["a"])
    arguments = ["--input", str(path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main(arguments) == 0
    with open(tmp_path / "out" / "journal" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert main(arguments) == 0


def test_a_tokenizer_that_changes_text_is_named_and_its_documents_counted(
    tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be checked is said, and how many of a sample came back as other text."""
    layout = json.loads(train_tokenizer(["Capital letters and others"] * 9, 300))
    tokenizer = tmp_path / "tokenizer.json"
    path = write_jsonl([f"Document {number}" for number in range(3000)])
    said = {}
    for name, normalizer in (("kept", None), ("lowered", {"type": "Lowercase"})):
        tokenizer.write_text(json.dumps(layout | {"normalizer": normalizer}))
        output = tmp_path / name
        arguments = ["--input", str(path), "--output", str(output), "--tokenizer", str(tokenizer)]
        assert main([*arguments, "--workers", "1"]) == 0
        assert verify.main([str(output)]) == 0
        said[name] = capsys.readouterr()
    assert (
        "note: it normalizes text, so text need not come back from its ids" in said["lowered"].err
    )
    counted = re.search(
        r"of (\d) documents that were decoded again, \1 came back as other text",
        said["lowered"].err,
    )
    assert counted, said["lowered"].err
    assert (
        "documents were not decoded back to their text: it normalizes text" in said["lowered"].out
    )
    assert "decoded" not in said["kept"].err + said["kept"].out
    for name, is_counted in (("kept", False), ("lowered", True)):
        entry = json.loads((tmp_path / name / "journal" / "00000.json").read_bytes())
        assert ("sampled" in entry) is is_counted
