"""Reading training batches: warm, cold, from ten thousand shards, with documents and packing.

`python benchmarks/loader.py [--quick] [--folder DIR]` makes sets of random tokens (2 GB on disk;
--quick: a few MB) in a temporary folder, takes this project's reader and np.memmap in turn in the
same process, prints the tables, and writes them to README.md beside this file.

Legend: B sequences of a batch, S sequence length, n future tokens.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.memory_vs_heads import hardware
from benchmarks.synthetic_set import make_set
from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.loading.packing import pack
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.arrow_file import read_shard
from data_prep.shards.shard_set import ShardSet

S, N, B = 4096, 4, 8
WINDOW = S + N
Row = tuple[str, ...]


class Sizes(NamedTuple):
    """How much is measured."""

    shards: int
    shard_tokens: int
    many_shards: int
    cold_sequences: int
    rounds: int
    batches: int
    packed_documents: int


FULL = Sizes(2, 1 << 28, 10_000, 400, 9, 40, 10_000_000)
QUICK = Sizes(2, 1 << 20, 200, 40, 3, 4, 20_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="loader.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no files")
    parser.add_argument("--folder", type=Path, help="a disk with room (default: the system's)")
    parser.add_argument("--pack", type=int, metavar="DOCUMENTS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pack:
        print(*_pack_once(options.pack))
        return 0
    sizes = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        section = _section(sizes, Path(name))
    print(section)
    if not options.quick:
        _write(Path(__file__).resolve().parent / "README.md", section)
    return 0


def _section(sizes: Sizes, folder: Path) -> str:
    """The Markdown between the markers."""
    large, many, flat = folder / "large", folder / "many", folder / "flat.bin"
    make_set(large, shards=sizes.shards, tokens=sizes.shard_tokens)
    shards = ShardSet.open(large, "train")
    with flat.open("wb") as file:
        for start in range(0, shards.num_tokens, 1 << 22):
            file.write(shards.read(start, min(1 << 22, shards.num_tokens - start)).tobytes())
        file.flush()
        os.fsync(file.fileno())
    make_set(many, shards=sizes.many_shards, tokens=2000)
    head = (
        f"{hardware('cpu')} (1 used); Python {sys.version.split()[0]}, numpy {np.__version__}, "
        f"torch {torch.__version__}, pyarrow {version('pyarrow')}; {date.today().isoformat()}. "
        f"{shards.num_tokens * 2 / 1e6:,.0f} MB of uint16 tokens in {sizes.shards} shards; "
        f"batches of {B} sequences, S = {S}, n = {N}."
    )
    parts = [
        head,
        "Warm, CPU time; medians of rounds in turn:",
        _table(("", "million tokens/s", "ratio"), _warm(shards, flat, sizes)),
        f"Cold, {sizes.cold_sequences} random sequences, page cache dropped before each:",
        _table(
            ("", "s", "read from disk, MB", "over the needed bytes"), _cold(shards, flat, sizes)
        ),
        f"Opening a set of {sizes.many_shards:,} shards:",
        _table(("", "s"), _open(many)),
        "Packing and position:",
        _table(("", ""), _packing(sizes) + _position(shards)),
    ]
    return "\n\n".join(parts)


def _starts(count: int, tokens: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return (generator.integers(0, (tokens - N) // S, size=count) * S).tolist()


def _mapped_batch(mapped: NDArray[Any], starts: Sequence[int]) -> torch.Tensor:
    """The usual reader: slices of a mapping into one int64 tensor."""
    windows = np.empty((len(starts), WINDOW), np.int64)
    for window, start in zip(windows, starts, strict=True):
        window[:] = mapped[start : start + WINDOW]
    return torch.from_numpy(windows)


class _Reader:
    """As the loader reads: `preadv` into one reused buffer of the stored type, then one cast."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards
        self._tokens = np.empty((B, WINDOW), shards.dtype)
        self._parts = list(self._tokens)

    def __call__(self, starts: Sequence[int]) -> torch.Tensor:
        self._shards.read_many(starts, self._parts)
        return torch.from_numpy(self._tokens.astype(np.int64))


def _labelled(windows: torch.Tensor) -> Batch:
    shifted = [windows[:, head : head + S] for head in range(1, N + 1)]
    return Batch(windows[:, :S].contiguous(), torch.stack(shifted))


def _warm(shards: ShardSet, flat: Path, sizes: Sizes) -> list[Row]:
    """Tokens per second of CPU time, rounds in turn, every reader from the page cache."""
    mapped = np.memmap(flat, np.uint16, mode="r")
    plain, numbered = _loader(shards), _loader(shards, documents=True)
    reader = _Reader(shards)

    def copied(starts: Sequence[int]) -> torch.Tensor:
        windows = [torch.from_numpy(mapped[s : s + WINDOW].astype(np.int64)) for s in starts]
        return torch.stack(windows)

    # The loaders take their own, permuted sequences; the others get random starts.
    readers: dict[str, Callable[[list[int], int], object]] = {
        "sequences: np.memmap into one tensor": lambda starts, _: _mapped_batch(mapped, starts),
        "sequences: np.memmap, one tensor each, stacked": lambda starts, _: copied(starts),
        "sequences: this reader": lambda starts, _: reader(starts),
        "batches with labels: np.memmap": lambda starts, _: _labelled(
            _mapped_batch(mapped, starts)
        ),
        "batches with labels: this loader": lambda _, batch: plain.read(batch * B, B),
        "the same with document numbers": lambda _, batch: numbered.read(batch * B, B),
    }
    for start in range(0, shards.num_tokens, 1 << 22):  # warms the page cache
        shards.read(start, min(1 << 22, shards.num_tokens - start))
    mapped.sum(dtype=np.int64)
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(sizes.rounds):
        first = number * sizes.batches
        starts = [_starts(B, shards.num_tokens, first + batch) for batch in range(sizes.batches)]
        for name, read in readers.items():
            started = time.process_time()
            for batch in range(sizes.batches):
                read(starts[batch], first + batch)
            seconds = time.process_time() - started
            speeds[name].append(sizes.batches * B * S / seconds / 1e6)
    rows: list[Row] = []
    for name, speed in speeds.items():
        base = "sequences: np.memmap into one tensor"
        if not name.startswith("sequences"):
            base = "batches with labels: np.memmap"
        ratio = statistics.median(a / b for a, b in zip(speed, speeds[base], strict=True))
        rows.append((name, f"{statistics.median(speed):.0f}", f"{ratio:.2f}"))
    return rows


def _loader(shards: ShardSet, *, documents: bool = False) -> TokenLoader:
    return TokenLoader(
        shards, SequenceFormat(S, N, documents=documents), BatchLayout(micro_size=B), seed=0
    )


def _cold(shards: ShardSet, flat: Path, sizes: Sizes) -> list[Row]:
    """Time and disk reads of random sequences that are in no cache."""
    starts = _starts(sizes.cold_sequences, shards.num_tokens, 5)
    batches = [starts[first : first + B] for first in range(0, len(starts), B)]
    reader = _Reader(shards)
    files = [shards.directory / shard.path for shard in shards.shards]

    def mapped() -> None:
        file = np.memmap(flat, np.uint16, mode="r")
        for batch in batches:
            _mapped_batch(file, batch)

    def ours() -> None:
        for batch in batches:
            reader(batch)

    def numbered() -> None:
        ours()
        for start in starts:
            shards.document_starts(start, WINDOW)

    needed = sizes.cold_sequences * WINDOW * 2
    rows: list[Row] = []
    for name, read, paths in (
        ("np.memmap", mapped, [flat]),
        ("this reader", ours, files),
        ("this reader, with document starts", numbered, files),
    ):
        times, disk = [], []
        for _ in range(3):
            shards.close()
            for path in paths:
                _drop(path)
            before, started = _disk_bytes(), time.perf_counter()
            read()
            times.append(time.perf_counter() - started)
            disk.append(_disk_bytes() - before)
        found = statistics.median(disk)
        cells = (f"{statistics.median(times):.3f}", f"{found / 1e6:.1f}", f"{found / needed:.2f}")
        rows.append((name, *cells))
    return rows


def _drop(path: Path) -> None:
    """Take a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _open(directory: Path) -> list[Row]:
    """Time until the first batch can be read, and of opening every file with pyarrow instead."""
    opened, built = [], []
    for _ in range(5):
        started = time.perf_counter()
        shards = ShardSet.open(directory, "train")
        opened.append(time.perf_counter() - started)
        _loader(shards)
        built.append(time.perf_counter() - started)
    started = time.perf_counter()
    for shard in shards.shards:
        read_shard(directory / shard.path)
    mapped = time.perf_counter() - started
    return [
        ("ShardSet.open", f"{statistics.median(opened):.3f}"),
        ("ShardSet.open and TokenLoader", f"{statistics.median(built):.3f}"),
        ("pyarrow, each file mapped and its batch opened", f"{mapped:.3f}"),
    ]


def _packing(sizes: Sizes) -> list[Row]:
    """Best-fit packing in a process of its own, whose peak memory is its own."""
    command = [sys.executable, __file__, "--pack", str(sizes.packed_documents)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, resident, padding = map(float, done.stdout.split())
    what = f"best-fit packing of {sizes.packed_documents:,} documents into sequences of {S}"
    return [
        (f"{what}, CPU s", f"{seconds:.1f}"),
        ("its peak memory, bytes per document", f"{peak / sizes.packed_documents:.0f}"),
        ("kept, bytes per document", f"{resident / sizes.packed_documents:.0f}"),
        ("padding", f"{padding:.2%}"),
    ]


def _pack_once(documents: int) -> tuple[float, int, int, float]:
    lengths = np.random.default_rng(1).lognormal(5.5, 1.6, size=documents).astype(np.int64) + 1
    # Linux starts the peak anew from what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    started = time.process_time()
    packing = pack(lengths, S)
    seconds = time.process_time() - started
    kept = sum(part.nbytes for part in packing[:3])
    return seconds, _resident("VmHWM") - before, kept, packing.padding_share


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _position(shards: ShardSet) -> list[Row]:
    """A position far away costs what the first one does."""
    loader = _loader(shards)
    rows: list[Row] = []
    for name, sample in (("sample 0", 0), ("sample 10^12", 10**12)):
        times = []
        for number in range(50):
            started = time.process_time()
            loader.read(sample + number * B, B)
            times.append(time.process_time() - started)
        rows.append((f"a batch from {name}, ms", f"{statistics.median(times) * 1e3:.2f}"))
    return rows


def _table(heads: Row, rows: Sequence[Row]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _write(readme: Path, section: str) -> None:
    begin, end = (f"<!-- loader {word} -->" for word in ("begin", "end"))
    text = readme.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{readme} has no lines {begin} and {end}"
    readme.write_text(f"{before}{begin}\n{section}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
