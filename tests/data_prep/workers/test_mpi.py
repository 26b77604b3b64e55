"""Builds under a real MPI: claims, equal bytes, and ends that nobody waits for."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_prep.shard import main
from data_prep.workers.mpi import launched_ranks

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "data_prep" / "shard.py"
MPIEXEC = Path(sys.executable).parent / "mpiexec"
Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]

# Each rank writes down what it claimed; a third of the items is slow, so that claims interleave.
CLAIMER = """
import os, sys, time
from functools import partial
import numpy as np
from data_prep.workers.mpi import MpiWorkers, join_world
from data_prep.workers.phase import Done, Phase

def work(folder, item):
    with open(f"{folder}/{os.getpid()}", "a") as file:
        file.write(f"{item}\\n")
    if item % 300 == 0:
        time.sleep(0.05)
    return Done(tokens=item, rejects=1)

class Counter:
    bytes = tokens = rejects = 0
    def say(self, message): pass
    def start(self, verb, total_bytes, units): self.total = total_bytes
    def finish(self, *more):
        self.bytes, self.tokens, self.rejects = (
            a + b for a, b in zip((self.bytes, self.tokens, self.rejects), more))

def coordinate(world):
    counter, items = Counter(), 1000
    phase = Phase("p", "p", partial(work, sys.argv[1]), lambda item: item < 10, np.full(items, 7))
    MpiWorkers(world).run(phase, counter)
    expected = (7 * 990, sum(range(10, items)), 990)
    return 0 if (counter.bytes, counter.tokens, counter.rejects) == expected else 5

world = join_world(os.environ)
sys.exit(world.run(lambda: coordinate(world)))
"""


def mpirun(ranks: int, *arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run Python under mpiexec."""
    return subprocess.run(
        [MPIEXEC, "-n", str(ranks), sys.executable, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_every_item_is_claimed_once(tmp_path: Path) -> None:
    """Three ranks do 990 missing items of 1,000, each once, all take part, and totals add up."""
    (tmp_path / "claims").mkdir()
    done = mpirun(3, "-c", CLAIMER, str(tmp_path / "claims"))
    assert done.returncode == 0, done.stderr
    claims = [path.read_text().split() for path in (tmp_path / "claims").iterdir()]
    assert len(claims) == 3
    assert sorted(int(item) for part in claims for item in part) == list(range(10, 1000))


def test_same_bytes_for_any_number_of_ranks(
    tmp_path: Path, texts: list[str], write_jsonl: Write, read_tree: ReadTree
) -> None:
    """Three ranks, and one process, write the same files, tokenizer and duplicates included."""
    path = write_jsonl(texts + texts[:50])
    options = ["--input", str(path), "--tokenizer", "train:300", "--unit-bytes", "3000", "--dedup"]
    assert main([*options, "--output", str(tmp_path / "alone"), "--workers", "1"]) == 0
    done = mpirun(3, str(SCRIPT), *options, "--output", str(tmp_path / "ranks"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("350 records = 300 documents + 0 empty + 50 duplicates") == 1
    assert "3 MPI ranks" in done.stderr
    assert read_tree(tmp_path / "ranks") == read_tree(tmp_path / "alone")


def test_ranks_and_array_tasks_mark_the_same_targets(tmp_path: Path, read_tree: ReadTree) -> None:
    """Prompts and completions: the set of ranks, of tasks and of one process is the same."""
    path = tmp_path / "qa.jsonl"
    lines = [{"q": f"{n} + {n} = ", "a": f"{'so ' * (n % 7)}{2 * n}"} for n in range(400)]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = ["--input", str(path), "--tokenizer", "train:300", "--unit-bytes", "2000"]
    options += ["--prompt-key", "q", "--completion-key", "a"]
    alone, ranks, tasks = (tmp_path / name for name in ("alone", "ranks", "tasks"))
    assert main([*options, "--output", str(alone), "--workers", "1"]) == 0
    done = mpirun(3, str(SCRIPT), *options, "--output", str(ranks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert main([*options, "--output", str(tasks), "--workers", "1", "--array-task", "1/2"]) == 0
    assert read_tree(ranks) == read_tree(alone)
    assert read_tree(tasks) == read_tree(alone)


def test_a_failing_rank_ends_all(tmp_path: Path, texts: list[str], write_jsonl: Write) -> None:
    """A bad record under --on-bad fail ends the job with the rank, the file and the reason."""
    path = write_jsonl(texts)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:200]) + b"{bad\n" + b"".join(lines[200:]))
    done = mpirun(
        3, str(SCRIPT), "--input", str(path), "--output", str(tmp_path / "out"), "--tokenizer",
        "bytes", "--unit-bytes", "1000", "--on-bad", "fail",
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank ")
    assert "is bad: malformed JSON" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--tokenizer", "nowhere.json"), 1, "error: --tokenizer nowhere.json"),
        (("--tokenizer", "bytes", "--workers", "2"), 1, "error: --workers and --array-task"),
        (("--tokenizer", "bytes", "--frobnicate"), 2, "unrecognized arguments: --frobnicate"),
        (("--tokenizer", "bytes"), 3, "error: 1 of 2 records are bad"),
    ],
)
def test_errors_of_the_job_are_said_once(
    tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    """What is wrong with the job as a whole is said by rank 0, and every rank ends with it."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{\n')
    done = mpirun(
        2, str(SCRIPT), "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"),
        *arguments,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stderr.count(message) == 1


def test_a_killed_rank_ends_the_job_and_a_rerun_finishes_it(
    tmp_path: Path, large_texts: list[str], write_jsonl: Write, read_tree: ReadTree
) -> None:
    """SIGKILL of one rank ends the others within seconds; the rerun does what is missing."""
    path, output = write_jsonl(large_texts), tmp_path / "out"
    options = ["--input", str(path), "--tokenizer", "train:300", "--unit-bytes", "16384"]
    launcher = subprocess.Popen(
        [MPIEXEC, "-n", "2", sys.executable, SCRIPT, *options, "--output", output],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(output.glob("journal/[0-9]*.json"))) < 3:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    family = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [process for process in family if "shard.py" in " ".join(process.cmdline())]
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert launcher.wait(timeout=20) != 0
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []
    assert not (output / "manifest.json").exists()
    assert main([*options, "--output", str(output), "--workers", "1"]) == 0
    assert main([*options, "--output", str(tmp_path / "straight"), "--workers", "1"]) == 0
    assert read_tree(output) == read_tree(tmp_path / "straight")


def test_many_worlds_of_one_rank_are_refused(tmp_path: Path) -> None:
    """Where the launcher says 3 and MPI says 1, nothing is written and what to do is named."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    done = subprocess.run(
        [
            sys.executable, SCRIPT, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out",
            "--tokenizer", "bytes",
        ],
        env=os.environ | {"OMPI_COMM_WORLD_SIZE": "3"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "3 tasks were started but each is an MPI world of its own" in done.stderr
    assert "srun --mpi=pmix" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, 1),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, 2),
        ({"PMIX_RANK": "0"}, None),
    ],
)
def test_launchers_are_recognized(environment: dict[str, str], ranks: int | None) -> None:
    """Open MPI, MPICH and Slurm's steps; a batch script that only has an allocation is alone."""
    assert launched_ranks(environment) == ranks


def test_mpi_is_not_touched_without_a_launcher(tmp_path: Path) -> None:
    """A plain run imports no MPI: importing it would start it."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    code = (
        "import sys; from data_prep.shard import main; "
        "assert main(sys.argv[1:]) == 0; assert 'mpi4py' not in sys.modules"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", code, "--input", tmp_path / "a.jsonl", "--output",
            tmp_path / "out", "--tokenizer", "bytes", "--workers", "1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
