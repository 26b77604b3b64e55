"""The pieces of `benchmarks/gpu.sh`: each measures, and keeps what it has found as it goes."""

import collections
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_points import SIZES, Point
from benchmarks.gpu_processes import POINT_S, ROOT, Found, Waiting, call
from benchmarks.gpu_tables import line

LEAST_S = 20.0  # that are left when something is begun
MICRO = {"0.3b": 8, "1b": 4, "3b": 1, "tiny": 2}
ACCUMULATION = {"3b": 8}


def points(piece: str, size: str) -> list[Point]:
    """The points of a piece that trains; `size` is the one that its variations are of."""
    base = Point(size, micro=MICRO[size])
    sizes = [size] if size == "tiny" else ["1b", "3b", "0.3b"]
    found = {
        "heads": [
            Point(s, heads=n, micro=MICRO[s], accumulation=ACCUMULATION.get(s, 4))
            for s in sizes
            for n in (4, 1, 2, 8)
        ],
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
        seconds: of the whole call.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


Keep = Callable[[Found], None]
Piece = Callable[[str, str, Budget, Found, Keep], None]


def _run_tests(device: str, _: str, budget: Budget, found: Found, keep: Keep) -> None:
    """tests/gpu, as many as the time allows; the next call runs the others."""
    earlier: dict[str, str] = found.get("outcomes", {})
    longest_first = ["tests/gpu/test_runs.py", "tests/gpu/test_stages.py", "tests/gpu"]
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "--durations=5", *longest_first]
    if importlib.util.find_spec("xdist") is not None:  # most of their time is a CPU's
        command += ["-n", str(min(os.cpu_count() or 1, 16)), "--dist", "worksteal"]
    for name, outcome in earlier.items():
        command += ["--deselect", name] if outcome == "PASSED" else []
    done = call(command, min(240, budget.left_s()), HEADWAY_TEST_DEVICE=device)
    lines = done.output.splitlines()
    print("\n".join(lines[-15:]), flush=True)
    outcomes = earlier | outcomes_of_tests(done.output)
    failures = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    none_was_left = done.code == 5 and bool(earlier)  # pytest's code of a run without any test
    if done.code not in (0, None) and not failures and not none_was_left:
        said = [*lines, *done.errors.strip().splitlines()]  # without pytest, there is no output
        failures = said[-1:] or [f"exit code {done.code}"]
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


def _train(piece: str) -> Piece:
    """A piece of training points."""

    def run(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
        rows: dict[str, Found] = dict(found.get("rows", {}))
        wanted = points(piece, size)
        to_do = [point for point in wanted if str(point) not in rows]
        following = Waiting(device)
        try:
            for number, point in enumerate(to_do, 1):
                if budget.left_s() < LEAST_S:
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
                failed = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
                keep({"rows": rows, "failures": failed, "complete": len(rows) == len(wanted)})
        finally:
            following.end()

    return run


def _script(name: str, *options: str) -> Piece:
    """Another benchmark of this folder, which prints its own tables."""

    def run(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
        tiny = [options[0]] if size == "tiny" else list(options[1:])
        command = [sys.executable, str(ROOT / "benchmarks" / name), "--device", device, *tiny]
        done = call(command, budget.left_s())
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
        told, was_cut_off = _figures_of_a_run(Path(folder), device, size, budget)
    print(told.get("summary", ""), *told["failures"], sep="\n", flush=True)
    if was_cut_off:
        print("run: cut off by the time limit", flush=True)
    keep(found | told | {"complete": not was_cut_off})


def _figures_of_a_run(folder: Path, device: str, size: str, budget: Budget) -> tuple[Found, bool]:
    """What was found until a command failed or was cut off; and whether one was cut off."""
    said = ""
    failures: list[str] = []
    was_cut_off = False

    def succeeds(*command: str) -> bool:
        nonlocal said, was_cut_off
        done = call([sys.executable, "-W", "ignore", *command], budget.left_s())
        said, was_cut_off = done.output, done.code is None
        if done.code:
            failures.append(f"{' '.join(command[:2])}: {(said + done.errors).strip()[-500:]}")
        return done.code == 0

    layers, hidden = SIZES["tiny" if size == "tiny" else "0.3b"]
    sequence, micro = (64, 2) if size == "tiny" else (4096, 8)
    shards, run_dir, export = folder / "set", folder / "run", folder / "export"
    names = ("data_prep", "model", "pipeline", "docs")
    sources = [str(ROOT / name) for name in names if (ROOT / name).is_dir()]
    is_trained = succeeds(
        *("data_prep/shard.py", "--input", *sources, "--output", str(shards)),
        *("--tokenizer", "bytes", "--validation-fraction", "0"),
    ) and succeeds(
        *("-m", "pipeline.train", "configs/300m.yaml", "--set", f"data.shards={shards}"),
        *(f"run.dir={run_dir}", f"train.device={device}", f"data.sequence_length={sequence}"),
        *("train.precision=auto", f"batch.micro_size={micro}", "batch.accumulation=2"),
        *(f"model.layers={layers}", f"model.hidden_size={hidden}", "model.vocab_size=512"),
        *(f"model.attention_heads={hidden // 128}", "train.steps=12", "schedule.warmup_steps=2"),
        *("checkpoint.every_steps=6", "eval.every_steps=0", "log.interval=3", "checkpoint.keep=2"),
        "checkpoint.keep_every=0",
    )
    if not is_trained:
        return {"failures": failures}, was_cut_off
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
    # On a GPU two minutes; without these limits it would take more than a call has.
    few = ["--rounds", "2", "--tokens", "48", "--batches", "1", "16", "--spreads", "1"]
    if succeeds("-m", "pipeline.export", str(run_dir), str(export)) and succeeds(
        *("benchmarks/decoding.py", str(export), "--device", device),
        *(["--quick"] if size == "tiny" else few),
    ):
        table = said[max(said.rfind("| batch |"), 0) :]  # it is printed anew after each batch
        summary += "\n\nDecoding its export (12 steps old, so that few drafts are kept):"
        summary += f"\n\n{table}"
    return {"summary": summary, "records": records, "failures": failures}, was_cut_off


def _train_arms(device: str, size: str, budget: Budget, found: Found, keep: Keep) -> None:
    """The arms of `benchmarks/training.py`, one after the other."""
    from benchmarks import training  # with torch, which the other pieces leave to their processes

    workload = training.TINY if size == "tiny" else training.WORKLOADS[device]
    arms = training.arms(device)
    turns = {name: [tuple(turn) for turn in told] for name, told in found.get("arms", {}).items()}
    failed: dict[str, str] = dict(found.get("failed", {}))
    for name in arms:
        if name in turns or name in failed or budget.left_s() < LEAST_S:
            continue
        limit_s = min(POINT_S, budget.left_s())
        measured, went_wrong = training.measure(workload, device, 3, [name], limit_s)
        if name not in measured and limit_s < POINT_S and went_wrong[name] == training.TOO_LONG:
            break  # it was the call that had no more time
        turns |= measured
        failed |= went_wrong if name not in measured else {}
        told = {
            "arms": turns,
            "failed": failed,
            "summary": training.section(turns, failed, workload, device),
            "failures": [f"{n}: {why}" for n, why in failed.items() if n not in training.OPTIONAL],
        }
        keep(told | {"complete": turns.keys() | failed.keys() == arms.keys()})
    if found.get("summary") or turns:
        print(training.section(turns, failed, workload, device), flush=True)


PIECES: dict[str, Piece] = {
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
    "training": _train_arms,
}
