"""Peak memory of a training step against the number of heads: sequential, and the joint loss.

`python benchmarks/memory_vs_heads.py [--quick] [--time] [--kind KIND] [--device auto|cpu|cuda]`
measures every point in a process of its own, prints the table, and writes it to README.md beside
this file and the raw numbers to results/.
"""

import argparse
import json
import multiprocessing
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.workload import Measurement, Mode, Point, Workload
from model.structure.head_kinds import HeadKind

MODES: tuple[Mode, ...] = ("sequential", "joint")
FULL = Workload(layers=12, hidden_size=256, batch=2, sequence=512, chunk_tokens=256)
QUICK = Workload(layers=5, hidden_size=64, batch=2, sequence=32, chunk_tokens=16)
MIB = 2**20
Results = dict[Point, Measurement]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = replace(QUICK if options.quick else FULL, kind=options.kind)
    vocabularies = (2048,) if options.quick else (32 * 1024, 128 * 1024)
    heads = options.heads or ((1, 2, 4) if options.quick else range(1, 9))
    if options.vocabularies:
        vocabularies = tuple(options.vocabularies)
    points = [Point(v, n, mode) for v in vocabularies for n in heads for mode in MODES]
    results: Results = {}
    for point in points:
        results[point] = in_own_process(workload, point, device, 3 if options.time else 0)
        print(_line(point, results[point]), file=sys.stderr, flush=True)
    section = _section(workload, results, device)
    print(section)
    output = options.output
    if output is None and not options.quick:
        output = Path(__file__).resolve().parent
    if output is not None:
        _write(output, section, workload, results, device)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="memory_vs_heads.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no files")
    parser.add_argument("--time", action="store_true", help="also the time of a step (3 more)")
    parser.add_argument(
        "--heads", type=int, nargs="+", metavar="N", help="numbers of heads (default 1 .. 8)"
    )
    parser.add_argument(
        "--kind", choices=get_args(HeadKind), default="parallel", help="of heads (model.head_kind)"
    )
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", metavar="V", help="default 32768 131072"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where README.md and results/ are written"
    )
    return parser.parse_args(arguments)


def in_own_process(workload: Workload, point: Point, device: str, timed_steps: int) -> Measurement:
    """Measure in a fresh process: its peak is of this point alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.training_step"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, workload, point, device, timed_steps))
    process.start()
    sender.close()
    try:
        result: Measurement = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(
            f"{point} ended with status {process.exitcode}; if it was killed (-9), the machine "
            "has too little memory for the joint loss: try --quick"
        ) from None
    process.join()
    return result


def _child(sender: Connection, *arguments: Any) -> None:
    # Imported here: the fork server has it loaded, and the parent needs no megatron.
    from benchmarks.training_step import measure

    sender.send(measure(*arguments))


def _line(point: Point, result: Measurement) -> str:
    return (
        f"vocabulary {point.vocabulary}, {point.heads} heads, {point.mode}: "
        f"saved {result.saved_bytes / MIB:.0f} MiB, peak {result.peak_bytes / MIB:.0f} MiB"
    )


def _section(workload: Workload, results: Results, device: str) -> str:
    """The Markdown between a device's markers."""
    parts = [
        f"{hardware(device)}; {versions()}; {date.today().isoformat()}. "
        f"{workload.layers} layers in all, {workload.kind} heads, hidden size "
        f"{workload.hidden_size}, {workload.batch} x {workload.sequence} tokens, "
        f"{'bf16' if device == 'cuda' else 'fp32'}, loss chunks of {workload.chunk_tokens} tokens."
    ]
    parts += [_table(results, v) for v in sorted({point.vocabulary for point in results})]
    return "\n\n".join(parts)


def _table(results: Results, vocabulary: int) -> str:
    """One vocabulary's rows and what they come to."""
    heads = sorted({point.heads for point in results})
    timed = all(result.step_s is not None for result in results.values())
    rows = [
        f"Vocabulary {vocabulary}, MiB:\n",
        "| n | saved, sequential | saved, joint | peak, sequential | peak, joint "
        "| joint / sequential |" + (" step time, sequential / joint |" if timed else ""),
        "|---|---|---|---|---|---|" + ("---|" if timed else ""),
    ]
    for n in heads:
        ours, joint = (results[Point(vocabulary, n, mode)] for mode in MODES)
        sizes = (ours.saved_bytes, joint.saved_bytes, ours.peak_bytes, joint.peak_bytes)
        cells = [str(n), *(f"{size / MIB:.0f}" for size in sizes)]
        cells.append(f"{joint.peak_bytes / max(ours.peak_bytes, 1):.2f}")
        if ours.step_s is not None and joint.step_s is not None:
            cells.append(f"{ours.step_s / joint.step_s:.2f}")
        rows.append("| " + " | ".join(cells) + " |")
    growth = [
        results[Point(vocabulary, heads[-1], mode)].peak_bytes
        / max(results[Point(vocabulary, heads[0], mode)].peak_bytes, 1)
        for mode in MODES
    ]
    rows.append(
        f"\nPeak at n = {heads[-1]} over peak at n = {heads[0]}: "
        f"sequential {growth[0]:.2f}, joint {growth[1]:.2f}."
    )
    return "\n".join(rows)


def hardware(device: str) -> str:
    """The device's name, for a table."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> str:
    """Of what a measurement depends on."""
    return f"torch {torch.__version__}, megatron-core {version('megatron-core')}"


def _write(output: Path, section: str, workload: Workload, results: Results, device: str) -> None:
    """Replace the section of device and kind in README.md, and write results/."""
    readme = output / "README.md"
    kind = "" if workload.kind == "parallel" else f" {workload.kind}"
    begin, end = (f"<!-- memory_vs_heads {device}{kind} {word} -->" for word in ("begin", "end"))
    text = readme.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{readme} has no lines {begin} and {end}"
    readme.write_text(f"{before}{begin}\n{section}\n{end}{after}")
    raw = {
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "versions": versions(),
        "workload": asdict(workload),
        "points": [asdict(point) | asdict(result) for point, result in results.items()],
    }
    folder = output / "results"
    folder.mkdir(exist_ok=True)
    name = f"memory_vs_heads-{device}{kind.replace(' ', '-')}.json"
    (folder / name).write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
