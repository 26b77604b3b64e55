"""Tokens a second and memory of training, beside plain PyTorch and `transformers.Trainer`.

`python benchmarks/training.py [--tiny] [--device cpu|cuda] [--turns N] [--output DIR]` builds every
arm in a process of its own and lets them train in turns, so that they meet the same machine; the
medians of their turns are compared. With --output the table goes to README.md there.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

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
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="training.py")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="of each arm")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where README.md is")
    options = parser.parse_args(arguments)
    workload = TINY if options.tiny else WORKLOADS[options.device]
    results, failures = measure(workload, options.device, options.turns)
    section = _section(results, failures, workload, options.device)
    print(section)
    if options.output is not None:
        replace_section(options.output / "README.md", f"training {options.device}", section)
        raw = options.output / "results" / f"training-{options.device}.json"
        raw.write_text(json.dumps(results | failures, indent=1) + "\n", encoding="utf-8")
    return 1 if failures.keys() - {"transformers.Trainer, n = 1, ZeRO-1"} else 0


def measure(
    workload: Workload, device: str, turns: int
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """Every arm's turns, taken one arm after the other, round after round.

    Returns:
        Turns by arm, without each arm's first, which warms it up; and what went wrong by arm.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    results: dict[str, list[Turn]] = {name: [] for name in ARMS}
    failures: dict[str, str] = {}
    for name, arm in ARMS.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, arm, workload, device), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        _ask(name, pipes, failures)  # builds, and takes the first turn
    for number in range(turns):
        for name in ARMS:
            if name not in failures and (turn := _ask(name, pipes, failures)) is not None:
                results[name].append(turn)
                print(f"{number} {name}: {turn[0]:.3f} s", file=sys.stderr, flush=True)
    for process in processes:
        process.kill()
    return {name: found for name, found in results.items() if found}, failures


def _ask(name: str, pipes: dict[str, Connection], failures: dict[str, str]) -> Turn | None:
    try:
        pipes[name].send("go")
        answer = pipes[name].recv()
    except (EOFError, OSError):
        answer = "its process ended"
    if isinstance(answer, str):
        failures[name] = answer
        print(f"{name}: {answer}", file=sys.stderr, flush=True)
        return None
    turn: Turn = answer
    return turn


def _child(pipe: Connection, arm: Arm, workload: Workload, device: str) -> None:
    import logging
    import warnings

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


def _section(
    results: dict[str, list[Turn]], failures: dict[str, str], workload: Workload, device: str
) -> str:
    seconds = {name: statistics.median(t for t, _ in turns) for name, turns in results.items()}
    peaks = {name: max(peak for _, peak in turns) for name, turns in results.items()}
    lines = [
        f"{machine_line(device)} {workload.layers} layers in all, hidden size {workload.hidden}, "
        f"vocabulary {workload.vocabulary}, {workload.accumulation} micro-batches of "
        f"{workload.batch} x {workload.sequence} tokens, {'bf16' if device == 'cuda' else 'fp32'}; "
        "median of turns, [least, most].",
        "",
        "| | tokens/s | against plain PyTorch of that n | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for name, turns in results.items():
        baseline = f"plain PyTorch, n = {ARMS[name].heads}"
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
