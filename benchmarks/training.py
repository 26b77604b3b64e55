"""Tokens a second and memory of training, beside plain PyTorch and `transformers.Trainer`.

`python benchmarks/training.py [--tiny] [--device cpu|cuda] [--turns N] [--output DIR]` builds every
arm in a process of its own; the medians of their turns are compared. On a CPU, which other work may
share, they train in turns, so that they meet the same machine. On a GPU, whose memory has room for
one, an arm ends before the next begins. With --output the table goes to README.md there.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu_processes import die_with_parent
from benchmarks.tables import machine_line, replace_section
from benchmarks.training_arms import Arm, Turn, Workload, run_arm

TINY = Workload(layers=5, hidden=64, vocabulary=512, batch=2, sequence=32, accumulation=2, steps=1)
WORKLOADS = {
    "cpu": Workload(
        layers=12, hidden=256, vocabulary=32_768, batch=4, sequence=256, accumulation=2, steps=1
    ),
    "cuda": Workload(
        layers=24, hidden=1024, vocabulary=32_768, batch=8, sequence=2048, accumulation=4, steps=2
    ),
}
ARMS = {
    "plain PyTorch, n = 4": Arm("plain", 4),
    "Headway, n = 4, ZeRO-1": Arm("headway", 4),
    "Headway, n = 4, ZeRO-1, joint backward": Arm("headway", 4, backward="joint"),
    "plain PyTorch, n = 1": Arm("plain", 1),
    "Headway, n = 1, ZeRO-1": Arm("headway", 1),
    "transformers.Trainer, n = 1, ZeRO-1": Arm("trainer", 1),
}
COMPILED = {
    "plain PyTorch, n = 4, torch.compile": Arm("plain", 4, is_compiled=True),
    "plain PyTorch, n = 1, torch.compile": Arm("plain", 1, is_compiled=True),
}
OPTIONAL = {"transformers.Trainer, n = 1, ZeRO-1"}  # not installed everywhere
TOO_LONG = "took too long"
MIB = 2**20


def arms(device: str) -> dict[str, Arm]:
    """What is compared on a device, by name."""
    return ARMS | COMPILED if device == "cuda" else ARMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="training.py")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="of each arm")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where README.md is")
    options = parser.parse_args(arguments)
    workload = TINY if options.tiny else WORKLOADS[options.device]
    results: dict[str, list[Turn]] = {}
    failures: dict[str, str] = {}
    names = list(arms(options.device))
    for together in [names] if options.device == "cpu" else [[name] for name in names]:
        measured, went_wrong = measure(workload, options.device, options.turns, together)
        results |= measured
        failures |= went_wrong
    text = section(results, failures, workload, options.device)
    print(text)
    if options.output is not None:
        replace_section(options.output / "README.md", f"training {options.device}", text)
        raw = options.output / "results" / f"training-{options.device}.json"
        raw.write_text(json.dumps(results | failures, indent=1) + "\n", encoding="utf-8")
    return 1 if failures.keys() - OPTIONAL else 0


def measure(
    workload: Workload, device: str, turns: int, names: Sequence[str], limit_s: float | None = None
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """Turns of some arms, taken one arm after the other, round after round.

    Args:
        workload: what they train.
        device: where.
        turns: of each arm, after one that warms it up.
        names: of the arms.
        limit_s: for all of it; an arm that has not answered by then has failed, `TOO_LONG`.

    Returns:
        Turns by arm; and what went wrong by arm.
    """
    context = multiprocessing.get_context("spawn")
    end = math.inf if limit_s is None else time.monotonic() + limit_s
    children: dict[str, tuple[Connection, BaseProcess]] = {}
    results: dict[str, list[Turn]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            told = (theirs, arms(device)[name], workload, device)
            process = context.Process(target=_child, args=told, daemon=True)
            process.start()
            theirs.close()
            children[name] = (ours, process)
            _ask(name, ours, failures, end)  # builds, and takes the first turn
        for number in range(turns):
            for name, (ours, _) in children.items():
                if name not in failures and (turn := _ask(name, ours, failures, end)) is not None:
                    results[name].append(turn)
                    print(f"{number} {name}: {turn[0]:.3f} s", file=sys.stderr, flush=True)
    finally:
        for _, child in children.values():
            child.kill()
            child.join(5)
    return {name: found for name, found in results.items() if found}, failures


def _ask(name: str, pipe: Connection, failures: dict[str, str], end: float) -> Turn | None:
    answer: Turn | str = TOO_LONG
    try:
        pipe.send("go")
        if pipe.poll(None if end == math.inf else max(end - time.monotonic(), 0)):
            answer = pipe.recv()
    except (EOFError, OSError):
        answer = "its process ended"
    if isinstance(answer, str):
        failures[name] = answer
        print(f"{name}: {answer}", file=sys.stderr, flush=True)
        return None
    return answer


def _child(pipe: Connection, arm: Arm, workload: Workload, device: str) -> None:
    import logging
    import warnings

    die_with_parent()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        turns = run_arm(arm, workload, device)
        while pipe.recv():
            pipe.send(next(turns))
    except EOFError:
        return
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        pipe.send(f"{type(error).__name__}: {first_line}")


def section(
    results: dict[str, list[Turn]], failures: dict[str, str], workload: Workload, device: str
) -> str:
    """The table, as Markdown."""
    seconds = {name: statistics.median(t for t, _ in turns) for name, turns in results.items()}
    peaks = {name: max(peak for _, peak in turns) for name, turns in results.items()}
    lines = [
        f"{machine_line(device)} {workload.layers} layers in all, hidden size {workload.hidden}, "
        f"vocabulary {workload.vocabulary}, {workload.accumulation} micro-batches of "
        f"{workload.batch} x {workload.sequence} tokens, {'bf16' if device == 'cuda' else 'fp32'}; "
        + ("one arm after the other, " if device == "cuda" else "")
        + "median of turns, [least, most].",
        "",
        "| | tokens/s | against plain PyTorch of that n | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for name, turns in results.items():
        baseline = f"plain PyTorch, n = {arms(device)[name].heads}"
        rates = sorted(workload.tokens / t for t, _ in turns)
        spread = f"[{rates[0]:,.0f}, {rates[-1]:,.0f}]"
        ratio = f"{seconds[baseline] / seconds[name]:.2f}" if baseline in seconds else "-"
        memory = f"{peaks[name] / MIB:,.0f}"
        if peaks.get(baseline) and name != baseline:  # a tiny step may need none above the start
            memory += f" ({peaks[name] / peaks[baseline]:.2f})"
        lines.append(
            f"| {name} | {workload.tokens / seconds[name]:,.0f} {spread} | {ratio} | {memory} |"
        )
    lines += [f"| {name} | not measured: {reason} | | |" for name, reason in failures.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
