"""Memory of data preparation against the size of the corpus, and against the number of units.

Two questions, each answered by the real command in processes of their own:

1. The largest process while a corpus of 64 MB, 256 MB and 1 GB is tokenized in units of 64 MiB,
   the largest that are chosen by themselves, by one process and by two MPI ranks.
2. The process that plans and commits, for 1,000 to 100,000 units. Their journal entries are
   written beforehand, over empty shard files, so that nothing is left to encode.

    python benchmarks/data_prep_memory.py [--quick]
"""

import argparse
import hashlib
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import orjson
import psutil

from data_prep.building.build import build
from data_prep.building.journal import JOURNAL, UnitRecord
from data_prep.building.options import BuildOptions
from data_prep.shards.manifest import Ledger, ShardEntry
from data_prep.tokenization.tokenizer import train_tokenizer
from data_prep.workers.phase import Observer, Phase

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data_prep" / "shard.py"
README = ROOT / "benchmarks" / "README.md"
UNIT_BYTES = 1 << 26
VOCABULARY = 32_000
WORDS = 60_000
LINE_BYTES = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both measurements; print the tables, and write them unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small sizes; prints, writes nothing")
    quick = parser.parse_args(arguments).quick
    sizes = (8, 32) if quick else (64, 256, 1024)
    units = (100, 1000) if quick else (1000, 10_000, 100_000)
    with tempfile.TemporaryDirectory(prefix="data-prep-memory-") as name:
        folder = Path(name)
        rows = list(_measure_corpora(folder, sizes))
        planned = list(_measure_units(folder, units))
    table = _report(rows, planned)
    print(table)
    if not quick:
        _write(table)
    return 0


def _measure_corpora(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """Peak of the largest process in MB, alone and with two ranks, for each size in MB."""
    words = _make_words()
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes(train_tokenizer(_make_texts(words, 20), VOCABULARY))
    for size in sizes:
        corpus = folder / f"{size}.jsonl"
        with corpus.open("wb") as file:
            for text in _make_texts(words, size):
                file.write(orjson.dumps({"text": text}) + b"\n")
        options = [
            *("--input", str(corpus), "--tokenizer", str(tokenizer)),
            *("--unit-bytes", str(UNIT_BYTES)),
        ]
        command = [sys.executable, str(SCRIPT), *options]
        alone = [*command, "--workers", "1"]
        ranks = [str(Path(sys.executable).parent / "mpiexec"), "-n", "2"]
        yield (
            size,
            _peak_mb([*alone, "--output", str(folder / f"alone-{size}")]),
            _peak_mb([*ranks, *command, "--output", str(folder / f"ranks-{size}")]),
        )
        corpus.unlink()


def _measure_units(folder: Path, counts: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """Peak of the process in MB and its seconds, for each number of units."""
    for count in counts:
        corpus, output = folder / f"units-{count}.jsonl", folder / f"units-{count}"
        with corpus.open("wb") as file:
            file.truncate(count * LINE_BYTES)
        options = BuildOptions(output, "bytes", inputs=(corpus,), unit_bytes=LINE_BYTES)
        build(options, _Silence(), _FakeWorkers(output))
        (output / "manifest.json").unlink()
        command = [
            *(sys.executable, str(SCRIPT), "--input", str(corpus), "--output", str(output)),
            *("--tokenizer", "bytes", "--unit-bytes", str(LINE_BYTES), "--workers", "1"),
        ]
        started_s = time.monotonic()
        yield count, _peak_mb(command), time.monotonic() - started_s


class _Silence:
    def say(self, message: str) -> None:
        pass

    def start(self, verb: str, total_bytes: int, units: int) -> None:
        pass

    def finish(self, input_bytes: int, tokens: int, rejects: int) -> None:
        pass

    def reading(self, text_bytes: int) -> None:
        """Ignore signs of life."""

    def skip(self, input_bytes: int) -> None:
        pass


class _FakeWorkers:
    """Workers that write what finished units leave: journal entries, and empty files as shards."""

    shares_output = False

    def __init__(self, output: Path) -> None:
        self._output = output.absolute()

    def run(self, phase: Phase, observer: Observer) -> None:
        """Every unit has one document in each split."""
        del observer
        assert isinstance(phase.is_finished, partial)
        _, job_id = phase.is_finished.args
        for split in ("train", "validation"):
            (self._output / "shards" / split / "corpus").mkdir(parents=True)
        for unit in range(len(phase.sizes)):
            digest = hashlib.md5(str(unit).encode()).hexdigest()
            shards = [
                ShardEntry(
                    path=f"shards/{split}/corpus/{unit:05d}.arrow", split=split, source="corpus",
                    unit=unit, bytes=0, rows=1, tokens=1 << 20, values_offset=1024,
                    offsets_offset=512, tokens_xxh3_128=digest, file_xxh3_128=digest[::-1],
                )
                for split in ("train", "validation")
            ]  # fmt: skip
            for shard in shards:
                (self._output / shard.path).touch()
            record = UnitRecord(
                unit=unit, job_id=job_id, shards=shards,
                ledgers={0: Ledger(records=2, documents=2)},
            )  # fmt: skip
            entry = self._output / JOURNAL / f"{unit:05d}.json"
            entry.write_text(record.model_dump_json())

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Nobody else works on this output."""
        del name
        yield

    def close(self) -> None:
        """Nothing is held."""


def _make_words() -> list[str]:
    rng = random.Random(3)
    letters = "etaoinshrdlcumwfgypbvk"
    return ["".join(rng.choices(letters, k=rng.randint(2, 11))) for _ in range(WORDS)]


def _make_texts(words: Sequence[str], megabytes: int) -> Iterator[str]:
    """Documents of 20 to 3,000 words, all different, about `megabytes` in all."""
    rng, left = random.Random(5), megabytes * 1_000_000
    while left > 0:
        text = " ".join(rng.choices(words, k=rng.randint(20, 3000)))
        left -= len(text) + 12
        yield text


def _peak_mb(command: Sequence[str]) -> float:
    """Run a command; the peak resident set of its largest process, in MB."""
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.Error):  # a process ended between two looks
                family = [root, *root.children(recursive=True)]
                peak = max(peak, *(_high_water_bytes(member.pid) for member in family))
            time.sleep(0.02)
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode()
    return peak / 1e6


def _high_water_bytes(pid: int) -> int:
    """The kernel's own mark of the largest resident set of a process so far."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            line = next((line for line in status if line.startswith("VmHWM")), "VmHWM: 0 kB")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024


def _report(
    corpora: Sequence[tuple[int, float, float]], planned: Sequence[tuple[int, float, float]]
) -> str:
    lines = [
        f"{platform.machine()}, {os.cpu_count()} threads; Python {platform.python_version()}; "
        f"{time.strftime('%Y-%m-%d')}. Vocabulary {VOCABULARY:,}, units of 64 MiB.",
        "",
        "| corpus, MB | one process, peak MB | of the smallest | two ranks, larger, peak MB |",
        "|---|---|---|---|",
        *(
            f"| {size:,} | {alone:.0f} | {alone / corpora[0][1]:.2f} | {ranks:.0f} |"
            for size, alone, ranks in corpora
        ),
        "",
        "| units on disk | planning and commit, peak MB | of the smallest | s |",
        "|---|---|---|---|",
        *(
            f"| {count:,} | {peak:.0f} | {peak / planned[0][1]:.2f} | {seconds:.1f} |"
            for count, peak, seconds in planned
        ),
    ]
    return "\n".join(lines)


def _write(table: str) -> None:
    begin, end = "<!-- data_prep_memory begin -->", "<!-- data_prep_memory end -->"
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    README.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
