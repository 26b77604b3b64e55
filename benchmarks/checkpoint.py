"""Checkpoints: what training waits for, throughput against the raw disk, conversion, memory.

`python benchmarks/checkpoint.py [--quick] [--folder DIR]` trains a model of 124 million parameters
on two ranks of this machine, saves it both ways in turn, loads it in the same layout and in
another, and writes and reads as many bytes without any of this in the same run. It prints a
table, and writes it to README.md beside this file and the raw numbers to results/.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.memory_vs_heads import hardware, versions
from pipeline.reporting.run_log import quieten_libraries

RANKS = 2
REPETITIONS = 3
GB = 1e9
Results = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="checkpoint.py")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes no files")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (.)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where README.md and results/ are written"
    )
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=options.folder or Path()))
    folder = folder.resolve()
    repetitions = 1 if options.quick else REPETITIONS
    quieten_libraries()
    os.environ.update(DS_ACCELERATOR="cpu", PYTHONWARNINGS="ignore")  # of the fork server, too
    # Imported late: DeepSpeed and megatron-core have things to say, and take seconds.
    from benchmarks.checkpoint_workload import measure_conversion, measure_saves

    try:
        ranks = _on_all_ranks(measure_saves, folder, options.quick, repetitions)
        for rank, found in enumerate(_on_all_ranks(measure_conversion, folder, options.quick)):
            ranks[rank] |= found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    section = _section(ranks, repetitions)
    print(section)
    output = options.output
    if output is None and not options.quick:
        output = Path(__file__).resolve().parent
    if output is not None:
        _write(output, section, ranks)
    return 0


def _on_all_ranks(function: Callable[..., Results], folder: Path, *arguments: Any) -> list[Results]:
    """Call `function(rank, folder, *arguments)` in ranks of a gloo world of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.checkpoint_workload"])
    rendezvous = folder / f"rendezvous_{function.__name__}"
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    for rank, (_, sender) in enumerate(pipes):
        context.Process(
            target=_rank_main, args=(sender, rank, rendezvous, function, folder, *arguments)
        ).start()
        sender.close()
    try:
        return [receiver.recv() for receiver, _ in pipes]
    except EOFError:
        raise SystemExit("a rank ended without a result; its own message stands above") from None


def _rank_main(
    sender: Connection,
    rank: int,
    rendezvous: Path,
    function: Callable[..., Results],
    folder: Path,
    *arguments: Any,
) -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    sender.send(function(rank, folder, *arguments))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _median(ranks: list[Results], name: str, figure: str) -> float:
    """Over the repetitions, of what the slower rank took."""
    keys = [key for key in ranks[0] if key.startswith(f"{name}_") and figure in ranks[0][key]]
    return statistics.median(max(rank[key][figure] for rank in ranks) for key in keys)


def _section(ranks: list[Results], repetitions: int) -> str:
    """The Markdown between the markers."""
    size = ranks[0]["model"]["bytes"]
    raw_write_s, raw_read_s = (_median(ranks, "raw", f"{way}_s") for way in ("write", "read"))
    sync_s, wait_s, total_s = (
        _median(ranks, "sync", "wait_s"),
        _median(ranks, "async", "wait_s"),
        _median(ranks, "async", "total_s"),
    )
    rows = [
        ("raw disk: write and sync", raw_write_s, raw_write_s),
        ("raw disk: read", raw_read_s, raw_read_s),
        ("synchronous save, training waits", sync_s, raw_write_s),
        ("asynchronous save, until committed", total_s, raw_write_s),
        ("asynchronous save, **training waits**", wait_s, raw_write_s),
        ("all checksums verified", _slower(ranks, "verify"), raw_read_s),
        ("loaded in the same layout (2 data)", _slower(ranks, "load"), raw_read_s),
        ("loaded in another layout (2 tensor)", _slower(ranks, "conversion"), raw_read_s),
    ]
    table = [
        f"| {what} | {seconds:.2f} | {size / seconds / GB:.2f} | {raw_s / seconds:.2f} |"
        for what, seconds, raw_s in rows
    ]
    steps = _median(ranks, "async", "step_s") / _median(ranks, "async", "plain_step_s")
    before = max(rank["memory_before"]["peak_mib"] for rank in ranks)
    # Of the first ones: the memory of the first copy is kept for the next.
    peaks = [
        f"{max(max(rank[f'{name}_0']['peak_mib'] for rank in ranks) - before, 0):,.0f}"
        for name in ("sync", "async")
    ]
    grown = [f"{max(r[name]['grown_mib'] for r in ranks):,.0f}" for name in ("load", "conversion")]
    return "\n".join(
        [
            f"{hardware('cpu')}, shared with other work; {versions()}; {date.today().isoformat()}. "
            f"{ranks[0]['model']['parameters'] / 1e6:.0f} million parameters, fp32, ZeRO-1 on "
            f"{RANKS} ranks: {size / GB:.2f} GB a checkpoint. Medians of {repetitions}.",
            "",
            "| | seconds | GB/s | speed / raw disk |",
            "|---|---|---|---|",
            *table,
            "",
            f"Training waits {sync_s / wait_s:.1f} times as long for a synchronous save as for an "
            f"asynchronous one. Steps beside a save in flight take {steps:.2f} times a step alone.",
            "",
            f"Memory of a rank above the peak of its training ({before:,.0f} MiB), at most, MiB: "
            f"synchronous save {peaks[0]}, asynchronous save {peaks[1]} (its share of the "
            f"checkpoint is {size / RANKS / 2**20:,.0f}), loading {grown[0]}, loading in another "
            f"layout {grown[1]}.",
        ]
    )


def _slower(ranks: list[Results], name: str) -> float:
    return max(rank[name]["wait_s"] for rank in ranks)


def _write(output: Path, section: str, ranks: list[Results]) -> None:
    """Replace the section of README.md, and write results/checkpoint-cpu.json."""
    readme = output / "README.md"
    begin, end = (f"<!-- checkpoint cpu {word} -->" for word in ("begin", "end"))
    before, found_begin, rest = readme.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    assert found_begin, f"{readme} has no line {begin}"
    assert found_end, f"{readme} has no line {end}"
    readme.write_text(f"{before}{begin}\n{section}\n{end}{after}")
    raw = {"date": date.today().isoformat(), "hardware": hardware("cpu"), "ranks": ranks}
    folder = output / "results"
    folder.mkdir(exist_ok=True)
    (folder / "checkpoint-cpu.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
