"""What data.review costs rank 0: time and memory of each phase, without a model.

`python benchmarks/review.py [--sequences N] [--quick] [--folder DIR]` lets the published schedule
run over N made-up sequences (10^8; 2.5 GB on disk) through the code of a run: each sample's
sequence is found, its loss recorded, arrays written, sequences chosen, a checkpoint taken and read
back, the profile counted. It prints the table, and writes it to README.md beside this file.
"""

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from benchmarks.tables import machine_line, replace_section
from data_prep.loading.review_order import Pass
from pipeline.config.review_section import ReviewSection
from pipeline.review.files import losses_name, read_losses
from pipeline.review.profile import profile_of
from pipeline.review.schedule import ReviewSchedule
from pipeline.review.statistics import Statistics

SEQUENCES, QUICK = 100_000_000, 100_000
STEP = 4096  # samples
_SAMPLE_S = 0.02


class Cost(NamedTuple):
    """What something took.

    Attributes:
        cpu_s: of one thread.
        wall_s: by the clock, waiting for the disk and for other work of the machine.
        growth_bytes: most memory of the process above what it had before, without mapped files.
    """

    cpu_s: float
    wall_s: float
    growth_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="review.py")
    parser.add_argument("--sequences", type=int, default=SEQUENCES, metavar="N")
    parser.add_argument("--quick", action="store_true", help="10^5 sequences; writes no files")
    parser.add_argument("--folder", type=Path, help="a disk with room (default: the system's)")
    options = parser.parse_args(arguments)
    sequences: int = QUICK if options.quick else options.sequences
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows = measure(Path(name), sequences)
    lines = [
        machine_line(libraries=["numpy"]) + f" {sequences:,} sequences, steps of {STEP:,}.",
        "",
        "| | CPU, s | clock, s | microseconds of CPU a sample | memory, bytes a sequence |",
        "|---|---|---|---|---|",
    ]
    for what, samples, cost in rows:
        each = f"{cost.cpu_s / samples * 1e6:.2f}" if samples else ""
        lines.append(
            f"| {what} | {cost.cpu_s:.1f} | {cost.wall_s:.1f} | {each} "
            f"| {cost.growth_bytes / sequences:.2f} |"
        )
    print("\n".join(lines))
    if not options.quick:
        readme = Path(__file__).resolve().parent / "README.md"
        replace_section(readme, "review", "\n".join(lines))
    return 0


def measure(folder: Path, sequences: int) -> list[tuple[str, int, Cost]]:
    """What was done, to how many samples, at what cost; in the order of a run."""
    section = ReviewSection()
    schedule = ReviewSchedule(section, sequences)
    order = schedule.order([sequences], "made up", 1)
    statistics = Statistics(folder / "run", section, schedule, order)
    statistics.restore(None, 0)
    generator = np.random.default_rng(1)
    rows: list[tuple[str, int, Cost]] = []

    def record(one: Pass, share: float = 1.0) -> None:
        for first in range(one.first_sample, one.first_sample + int(one.size * share), STEP):
            count = min(STEP, one.end - first)
            statistics.record(first, generator.random(count, np.float32))

    def choose(phase: int) -> None:
        order.keep(phase, statistics.select(phase))

    def saved(checkpoint: Path) -> None:
        checkpoint.mkdir()
        statistics.files()(checkpoint)

    # Repetitions of the last phase cost what its first epoch does, so that one is enough.
    for one in schedule.passes[:4]:
        phase = f"phase {one.phase + 1} ({schedule.phases[one.phase].name})"
        if one.chosen:
            cost = _cost(functools.partial(choose, one.phase))
            rows.append((f"{phase}: choose its sequences", 0, cost))
        cost = _cost(functools.partial(record, one))
        rows.append((f"{phase}: record an epoch of {one.size:,} samples", one.size, cost))
    last = schedule.passes[4]
    record(last, 0.5)
    middle = last.first_sample + int(last.size * 0.5) // STEP * STEP
    checkpoint = folder / "checkpoint"
    rows.append(("checkpoint within an epoch", 0, _cost(lambda: saved(checkpoint))))
    again = Statistics(folder / "resumed", section, schedule, order)
    rows.append(("resume from it", 0, _cost(lambda: again.restore(checkpoint, middle))))
    review = folder / "run" / "review"
    epochs = [read_losses(review / losses_name(number), schedule.sequences) for number in range(4)]
    rows.append(("profile of 4 epochs", 0, _cost(lambda: profile_of(epochs))))
    return rows


def _cost(work: Callable[[], object]) -> Cost:
    """Do something, with an eye on it."""
    ended, most = threading.Event(), [0]
    before = _own_bytes()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            most[0] = max(most[0], _own_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    work()
    cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
    ended.set()
    watcher.join()
    return Cost(cpu_s, wall_s, max(most[0] - before, 0))


def _own_bytes() -> int:
    """Resident memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    sys.exit(main())
