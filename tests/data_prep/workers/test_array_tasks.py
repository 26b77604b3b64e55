"""Tasks of a job array: equal bytes, dead tasks, late tasks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.building.build import build
from data_prep.building.options import BuildOptions
from data_prep.errors import DataError
from data_prep.shard import main
from data_prep.workers import array_tasks
from data_prep.workers.array_tasks import ArrayTask, ArrayWorkers, Claims, find_array_task
from tests.data_prep.conftest import Silence

SCRIPT = Path(__file__).parents[3] / "data_prep" / "shard.py"
Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]


def start(task: str, *arguments: str, output: Path) -> "subprocess.Popen[str]":
    """Start one task."""
    return subprocess.Popen(
        [
            sys.executable, SCRIPT, "--array-task", task, "--output", output, "--workers", "1",
            *arguments,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_three_tasks_write_the_bytes_of_one_process(
    tmp_path: Path, texts: list[str], write_jsonl: Write, read_tree: ReadTree
) -> None:
    """Started together, with tokenizer training and duplicates, all succeed; no claim is left."""
    path = write_jsonl(texts + texts[:50])
    options = ["--input", str(path), "--tokenizer", "train:300", "--unit-bytes", "2000", "--dedup"]
    tasks = [start(f"{task}/3", *options, output=tmp_path / "array") for task in range(3)]
    for task in tasks:
        out, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors
        assert "350 records = 300 documents + 0 empty + 50 duplicates" in out
    assert main([*options, "--output", str(tmp_path / "alone"), "--workers", "1"]) == 0
    assert read_tree(tmp_path / "array") == read_tree(tmp_path / "alone")


def test_the_units_of_a_killed_task_are_done_by_another(
    tmp_path: Path, large_texts: list[str], write_jsonl: Write, read_tree: ReadTree
) -> None:
    """A task that dies holding claims costs nothing but its time; a task alone finishes the set."""
    path = write_jsonl(large_texts)
    options = ["--input", str(path), "--tokenizer", "train:300", "--unit-bytes", "16384"]
    output = tmp_path / "array"
    task = start("1/2", *options, output=output)
    deadline = time.monotonic() + 60
    while not list(output.glob("journal/[0-9]*.json")):
        assert task.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    task.send_signal(signal.SIGKILL)
    task.communicate()
    assert list(output.glob("journal/claims/*"))
    settings = ["--output", str(output), "--workers", "1", "--array-task", "0/2"]
    assert main([*options, *settings]) == 0
    assert main([*options, "--output", str(tmp_path / "alone"), "--workers", "1"]) == 0
    assert read_tree(output) == read_tree(tmp_path / "alone")


def test_a_late_task_finds_everything_done(
    tmp_path: Path, texts: list[str], write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task that starts after the commit ends well, and changes nothing."""
    path = write_jsonl(texts)
    options = ["--input", str(path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    assert main([*options, "--array-task", "0/2"]) == 0
    manifest = tmp_path / "out" / "manifest.json"
    first, time_ns = capsys.readouterr().out, manifest.stat().st_mtime_ns
    assert main([*options, "--array-task", "1/2"]) == 0
    assert capsys.readouterr().out == first
    assert manifest.stat().st_mtime_ns == time_ns


def test_a_failing_task_gives_its_claims_back(
    tmp_path: Path, texts: list[str], write_jsonl: Write
) -> None:
    """After an error no claim and no heartbeat is left to wait for."""
    path = write_jsonl(texts)
    path.write_bytes(path.read_bytes() + b"{bad\n")
    options = BuildOptions(
        tmp_path / "out", "bytes", inputs=(path,), unit_bytes=2000, on_bad="fail"
    )
    claims = tmp_path / "out" / "journal" / "claims"
    with pytest.raises(DataError, match="malformed JSON"):
        build(options, Silence(), ArrayWorkers(ArrayTask(0, 2), claims, processes=1))
    assert not claims.exists()


def test_a_silent_holder_on_another_machine_loses_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its heartbeat moves, a claim holds; when that stops for the lease, it is free."""
    monkeypatch.setattr(array_tasks, "LEASE_S", 0.2)
    sign = tmp_path / "alive-elsewhere"
    sign.touch()
    owner = {"host": "elsewhere", "pid": os.getpid(), "sign": sign.name}
    (tmp_path / "encode-0").write_text(json.dumps(owner))
    claims = Claims(tmp_path)
    for beat in range(4):
        os.utime(sign, ns=(beat, beat))
        assert not claims.take("encode-0")
        time.sleep(0.1)
    time.sleep(0.2)
    assert claims.take("encode-0")
    assert not Claims(tmp_path).take("encode-0"), "held by this living process now"
    claims.close()


def test_a_dead_holder_on_this_machine_loses_its_claim_at_once(tmp_path: Path) -> None:
    """No lease has to pass for a process that is seen to be gone."""
    code = (
        "import os, sys; from pathlib import Path; "
        "from data_prep.workers.array_tasks import Claims; "
        "assert Claims(Path(sys.argv[1])).take('encode-0'); os._exit(0)"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=SCRIPT.parents[1], check=True, timeout=60
    )
    assert (tmp_path / "encode-0").exists()
    claims = Claims(tmp_path)
    assert claims.take("encode-0")
    claims.close()


@pytest.mark.parametrize(
    ("given", "environment", "task"),
    [
        (None, {}, None),
        ("0/1", {}, (0, 1)),
        ("7/8", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (7, 8)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (3, 4)),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2",
            },
            (2, 3),
        ),
    ],
)  # fmt: skip
def test_tasks_are_recognized(
    given: str | None, environment: dict[str, str], task: tuple[int, int] | None
) -> None:
    """What is given wins over Slurm's variables; arrays may start and step anywhere."""
    assert find_array_task(given, environment) == task


@pytest.mark.parametrize("given", ["8/8", "1", "a/b", "-1/2"])
def test_no_task_of_an_array_is_refused(given: str) -> None:
    """Tasks count from 0 to N - 1."""
    with pytest.raises(DataError, match="--array-task"):
        find_array_task(given, {})
