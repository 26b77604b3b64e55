"""Everything that one GPU can show, in at most ten minutes; see `benchmarks/gpu.sh`.

Pieces run in the order of their worth, each in processes of its own. What a piece has found is
written at once to results/gpu-cuda/PIECE.json and is not measured again by the next call on the
same commit, so that a call that was cut off goes on. The tables come from what is there.
"""

import argparse
import collections
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu_points import SIZES, Point
from benchmarks.gpu_tables import line, tables
from benchmarks.tables import machine_line, replace_section

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, Any]

_POINT_S = 150.0  # that a point may take
MICRO = {"0.3b": 8, "1b": 4, "3b": 2, "tiny": 2}


def points(piece: str, size: str) -> list[Point]:
    """The points of a piece that trains; `size` is the one that its variations are of."""
    base = Point(size, micro=MICRO[size])
    sizes = [size] if size == "tiny" else ["1b", "3b", "0.3b"]
    found = {
        "heads": [Point(s, heads=n, micro=MICRO[s]) for s in sizes for n in (4, 1, 2, 8)],
        "joint": [replace(base, heads=n, backward="joint", micro=1) for n in (1, 4)]
        + [replace(base, heads=n, micro=1) for n in (1, 4)],
        "memory": [
            replace(base, heads=n, vocabulary=v, accumulation=1, micro=1)
            for v in (131_072, 32_768)
            for n in (1, 8)
        ],
        "zero": [replace(base, zero=zero) for zero in (0, 2, 3)],
        "checkpointing": [replace(base, checkpointing=mode) for mode in ("selective", "full")],
        "attention": [replace(base, attention=name) for name in ("cudnn", "flash", "efficient")],
        "chunk": [replace(base, chunk=tokens) for tokens in (1024, 2048, 8192)],
        "compile": [replace(base, compiled=compiled) for compiled in (True, False)],
        "documents": [replace(base, documents=True)],
    }[piece]
    if size == "tiny":
        found = [
            replace(p, sequence=64, accumulation=2, steps=1, vocabulary=p.vocabulary // 64)
            for p in found
            if p.attention == "auto"
        ]
    return found


class Budget:
    """The time that is left.

    Args:
        minutes: of the whole call.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left_s(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status: 1 when something that ran has failed."""
    parser = argparse.ArgumentParser(description=__doc__, prog="gpu.sh")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to try the script")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole call")
    parser.add_argument(
        "--only", nargs="+", choices=PIECES, metavar="PIECE", help=f"of {', '.join(PIECES)}"
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="measure nothing: write the tables of the results that are there, of whatever commit",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", metavar="DIR")
    options = parser.parse_args(arguments)
    folder = options.output / "results" / f"gpu-{options.device}"
    folder.mkdir(parents=True, exist_ok=True)
    size = "tiny" if options.tiny else "1b"
    budget = Budget(options.minutes)
    wanted = [] if options.tables else options.only or PIECES
    for name in wanted:
        path = folder / f"{name}.json"
        found = _of_this_commit(path)
        if found.get("complete"):
            print(f"{name}: measured before on this commit", flush=True)
            continue
        started = time.monotonic()
        if budget.left_s() < 20:
            print(f"{name}: no time is left; call again to go on", flush=True)
            continue
        keep = functools.partial(_write, path, machine_line(options.device))
        PIECES[name](options.device, size, budget, found, keep)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    read = _found if options.tables else _of_this_commit
    results = {name: read(folder / f"{name}.json") for name in PIECES}
    section = tables(results)
    print(section)
    if options.device == "cuda":
        replace_section(options.output / "README.md", "gpu", section)
    return 1 if any(found.get("failures") for found in results.values()) else 0


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "not a clone"


def _found(path: Path) -> Found:
    try:
        found: Found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _of_this_commit(path: Path) -> Found:
    found = _found(path)
    return found if found.get("commit") == _commit() else {}


def _write(path: Path, machine: str, found: Found) -> None:
    partial = path.with_suffix(".partial")
    told = found | {"commit": _commit(), "machine": machine}
    partial.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    partial.replace(path)


Keep = Callable[[Found], None]


class Called(NamedTuple):
    """How a command ended: its exit code, None past the limit, and what it wrote where."""

    code: int | None
    output: str
    errors: str


def _call(command: Sequence[str], limit_s: float, **variables: str) -> Called:
    """Run a command; past the limit it ends with all that it started, which may hold the GPU."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=max(limit_s, 1))
            return Called(process.returncode, output, errors)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Called(None, *process.communicate())


def _run_tests(device: str, _: str, budget: Budget, found: Found, keep: Keep) -> None:
    """tests/gpu, as many as the time allows; the next call runs the others."""
    earlier: dict[str, str] = found.get("outcomes", {})
    longest_first = ["tests/gpu/test_runs.py", "tests/gpu/test_stages.py", "tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "--durations=5", *longest_first]
    if importlib.util.find_spec("xdist") is not None:  # most of their time is a CPU's
        command += ["-n", str(min(os.cpu_count() or 1, 16)), "--dist", "worksteal"]
    for name, outcome in earlier.items():
        command += ["--deselect", name] if outcome == "PASSED" else []
    done = _call(command, min(240, budget.left_s()), HEADWAY_TEST_DEVICE=device)
    lines = done.output.splitlines()
    print("\n".join(lines[-15:]), flush=True)
    outcomes = earlier | outcomes_of_tests(done.output)
    failures = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    if done.code not in (0, None) and not failures:
        failures = lines[-1:]
    counts = collections.Counter(outcome.lower() for outcome in outcomes.values())
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    if done.code is None:
        summary += "; the others had no time"
    told = {"summary": summary, "outcomes": outcomes, "failures": failures}
    keep(found | told | {"complete": done.code is not None})


def outcomes_of_tests(output: str) -> dict[str, str]:
    """Each test that ended and how, from what `pytest -v` wrote, on one worker or many."""
    words = "PASSED|FAILED|ERROR|SKIPPED"
    alone = re.findall(rf"^(tests/\S+?\.py::.+?) ({words})", output, re.MULTILINE)
    workers = re.findall(rf"^\[gw\d+\].*? ({words}) (tests/\S+?\.py::.+?) *$", output, re.MULTILINE)
    return dict(alone) | {name: outcome for outcome, name in workers}


def _train(piece: str) -> Callable[[str, str, Budget, Found, Keep], None]:
    """A piece of training points."""

    def run(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
        rows: dict[str, Found] = dict(found.get("rows", {}))
        wanted = points(piece, size)
        to_do = [point for point in wanted if str(point) not in rows]
        following = Waiting(device)
        for number, point in enumerate(to_do, 1):
            if budget.left_s() < 20:
                break
            ready = following
            if number < len(to_do):
                following = Waiting(device)
            is_traced = piece == "heads" and point == wanted[0]
            row = ready.measure(point, is_traced, budget.left_s())
            if row is None:
                break
            rows[str(point)] = row
            print(line(row), flush=True)
            failures = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
            keep({"rows": rows, "failures": failures, "complete": len(rows) == len(wanted)})
        following.end()

    return run


class Waiting:
    """A fresh process that has imported what it needs, and measures one point when it is told.

    It waits while the one before it measures: what an import takes, which leaves the device alone,
    passes beside it.

    Args:
        device: what it will measure.
    """

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, point: Point, trace: bool, left_s: float) -> Found | None:
        """What it measures, then it ends; the error, when it fails; None when no time was left."""
        answer: Found | None = None
        try:
            self._pipe.send((point, trace))
            if self._pipe.poll(min(left_s, _POINT_S)):
                answer = self._pipe.recv()
            elif left_s > _POINT_S:
                answer = vars(point) | {"error": "took too long"}
        except (EOFError, OSError):
            answer = vars(point) | {"error": "its process ended"}
        self.end()
        return answer

    def end(self) -> None:
        """Without an answer."""
        self._process.kill()
        self._process.join()


def _child(pipe: Any, device: str) -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from benchmarks.gpu_points import measure, prepare

    prepare(device)
    point, trace = pipe.recv()
    try:
        pipe.send(measure(point, device, trace))
    except BaseException as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        pipe.send(vars(point) | {"error": f"{type(error).__name__}: {first_line}"[:300]})


def _script(name: str, *options: str) -> Callable[[str, str, Budget, Found, Keep], None]:
    """Another benchmark of this folder, which writes its own tables."""

    def run(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
        tiny = [options[0]] if size == "tiny" else list(options[1:])
        command = [sys.executable, str(ROOT / "benchmarks" / name), "--device", device, *tiny]
        done = _call(command, budget.left_s())
        print(done.output[-3000:], flush=True)
        if done.code is None:
            print(f"{name}: cut off by the time limit", flush=True)
            return
        failures = [] if done.code == 0 else [done.errors.strip()[-500:]]
        keep(found | {"summary": done.output[-6000:], "failures": failures, "complete": True})

    return run


def _run_a_run(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
    """A run by the commands people type: the loader and the saves beside the training."""
    with tempfile.TemporaryDirectory(prefix="headway-run-") as folder:
        keep(found | _figures_of_a_run(Path(folder), device, size, budget))


def _figures_of_a_run(folder: Path, device: str, size: str, budget: Budget) -> Found:
    said = ""

    def call(*command: str) -> str | None:
        """Run a command; the end of what it said when it failed."""
        nonlocal said
        done = _call([sys.executable, "-W", "ignore", *command], budget.left_s())
        said = done.output
        if done.code is None:
            return f"{command[0]} {command[1]}: cut off by the time limit"
        return None if done.code == 0 else (said + done.errors).strip()[-500:]

    layers, hidden = SIZES["tiny" if size == "tiny" else "0.3b"]
    sequence, micro = (64, 2) if size == "tiny" else (4096, 8)
    shards, run_dir = folder / "set", folder / "run"
    sources = [
        name for name in ("data_prep", "model", "pipeline", "docs") if (ROOT / name).is_dir()
    ]
    failed = call(
        *("data_prep/shard.py", "--input", *sources, "--output", str(shards)),
        *("--tokenizer", "bytes", "--validation-fraction", "0"),
    ) or call(
        *("-m", "pipeline.train", "configs/300m.yaml", "--set", f"data.shards={shards}"),
        *(f"run.dir={run_dir}", f"train.device={device}", f"data.sequence_length={sequence}"),
        *("train.precision=auto", f"batch.micro_size={micro}", "batch.accumulation=2"),
        *(f"model.layers={layers}", f"model.hidden_size={hidden}", "model.vocab_size=512"),
        *(f"model.attention_heads={hidden // 128}", "train.steps=12", "schedule.warmup_steps=2"),
        *("checkpoint.every_steps=6", "eval.every_steps=0", "log.interval=3", "checkpoint.keep=2"),
        "checkpoint.keep_every=0",
    )
    if failed is not None:
        print(failed, flush=True)
        return {"failures": [failed], "complete": True}
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    stalls = [record["save_stall_s"] for record in records if "save_stall_s" in record]
    totals = [record["save_total_s"] for record in records if "save_total_s" in record]
    last = records[-1]
    summary = f"by the command: {last['tokens_per_s']:,.0f} tokens/s with its loader"
    if stalls:
        summary += (
            f"; a save took {max(totals, default=0.0):.2f} s, training waited {stalls[0]:.2f} s"
        )
    quick = ["--quick"] if size == "tiny" else []
    failed = call("-m", "pipeline.export", str(run_dir), str(folder / "export")) or call(
        "benchmarks/decoding.py", str(folder / "export"), "--device", device, *quick
    )
    summary += f"\n\nDecoding its export (12 steps old, so that few drafts are kept):\n\n{said}"
    print(summary, flush=True)
    failures = [] if failed is None else [failed]
    return {"summary": summary, "records": records, "failures": failures, "complete": True}


PIECES: dict[str, Callable[[str, str, Budget, Found, Keep], None]] = {
    "tests": _run_tests,
    "heads": _train("heads"),
    "memory": _train("memory"),
    "zero": _train("zero"),
    "attention": _train("attention"),
    "compile": _train("compile"),
    "chunk": _train("chunk"),
    "joint": _train("joint"),
    "checkpointing": _train("checkpointing"),
    "documents": _train("documents"),
    "run": _run_a_run,
    "loss": _script("loss_kernels.py", "--tiny"),
    "training": _script("training.py", "--tiny", "--turns", "3"),
}


if __name__ == "__main__":
    sys.exit(main())
