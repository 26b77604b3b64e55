"""How fast a corpus becomes shards: this project beside its peers, on one corpus and tokenizer.

Every peer runs in turn, in a process of its own, imports included, with the corpus in the page
cache: first all once, then all again, and the medians count. The ids of all that keep the order
of the documents are compared.

    python benchmarks/data_prep.py                    # about 41 MB of Python's own code
    python benchmarks/data_prep.py --megabytes 400
    python benchmarks/data_prep.py --quick            # 3 MB; prints, writes nothing
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from benchmarks.process_tree import Usage, measure
from benchmarks.source_corpus import Corpus, default_roots, make_corpus
from benchmarks.tokenizing_peers import EOS, why_missing
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
FLOOR = "tokenizers"
VOCABULARY = 32_000
TRAINING_BYTES = 40_000_000
MB = 1e6
PEER_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from benchmarks.tokenizing_peers import run; run(*sys.argv[2:])"
)


@dataclass(frozen=True)
class Runner:
    """One row of the table: who, with how many processes or threads."""

    peer: str
    workers: int

    @property
    def name(self) -> str:
        """As the table says it."""
        return f"{LABELS[self.peer]}, {self.workers}"


LABELS = {
    "headway": "**data_prep/shard.py**, processes",
    "tokenizers": "floor: tokenizers + Arrow, threads",
    "gigatoken": "gigatoken encode_files + Arrow, threads",
    "datasets": "HF datasets map + save_to_disk, processes",
    "datatrove": "datatrove DocumentTokenizer, processes",
    "megatron": "Megatron preprocess_data, processes",
}
RUNNERS = tuple(
    Runner(peer, workers)
    for peer, workers in (
        ("headway", 2), ("headway", 1), ("gigatoken", 2), ("gigatoken", 1), ("tokenizers", 2),
        ("datasets", 2), ("datatrove", 2), ("megatron", 2),
    )
)  # fmt: skip
Results = dict[Runner, list[Usage]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every peer that is installed, print the table, and put it into README.md."""
    given = _parse(arguments)
    runners = [runner for runner in RUNNERS if not given.only or runner.peer in given.only]
    for peer in dict.fromkeys(runner.peer for runner in runners):
        if missing := why_missing(peer):
            print(f"skipped: {LABELS[peer].split(',')[0]} ({missing})", flush=True)
    runners = [runner for runner in runners if not why_missing(runner.peer)]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        work = Path(folder)
        corpus = make_corpus(work / "corpus.jsonl", given.megabytes, given.root or default_roots())
        if corpus.path.stat().st_size < 0.95 * given.megabytes * MB:
            raise SystemExit(
                f"only {corpus.path.stat().st_size / MB:.0f} MB of text were found; ask for less "
                "with --megabytes, or name more folders with --root"
            )
        tokenizer = work / "tokenizer" / "tokenizer.json"
        tokenizer.parent.mkdir()
        tokenizer.write_bytes(train_tokenizer(_training_texts(corpus.path), given.vocabulary))
        print(
            f"corpus: {corpus.documents:,} documents, {corpus.text_bytes / MB:.1f} MB", flush=True
        )
        results = _run_all(runners, corpus, tokenizer, work, given.repeat)
    section = _section(corpus, given.vocabulary, given.repeat, results)
    print(section)
    if not given.quick:
        _write(given.output, section, given.megabytes, results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="data_prep.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 MB, a small vocabulary, once; writes no files")
    add("--megabytes", type=int, default=41, metavar="N", help="size of the corpus (41)")
    add("--vocabulary", type=int, default=VOCABULARY, metavar="N", help="of the tokenizer (32000)")
    add("--repeat", type=int, default=3, metavar="N", help="runs of each peer (3)")
    add("--only", nargs="+", choices=sorted(LABELS), metavar="PEER", help="these peers alone")
    add("--root", nargs="+", type=Path, metavar="DIR", help="where texts are taken from")
    add("--folder", type=Path, metavar="DIR", help="for the corpus and outputs (temporary)")
    add("--output", type=Path, default=HERE, metavar="DIR", help="of README.md and results/")
    given = parser.parse_args(arguments)
    if given.quick:
        given.megabytes, given.vocabulary, given.repeat = 3, 2000, 1
    return given


def _training_texts(corpus: Path) -> Iterator[str]:
    """The start of the corpus."""
    left = TRAINING_BYTES
    with corpus.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)["text"]
            left -= len(line)
            if left <= 0:
                return


def _run_all(
    runners: Sequence[Runner], corpus: Corpus, tokenizer: Path, work: Path, repeat: int
) -> Results:
    """Every runner in turn, again and again; what they store must be the same."""
    results: Results = {runner: [] for runner in runners}
    digests: dict[str, str] = {}
    for number in range(repeat):
        for runner in runners:
            with tempfile.TemporaryDirectory(dir=work) as out:
                usage = measure(_command(runner, corpus.path, tokenizer, out), _threads(runner))
                if number == 0:
                    digests[runner.name] = _digest(runner.peer, Path(out))
            results[runner].append(usage)
            print(
                f"{number + 1}/{repeat} {runner.name.replace('*', '')}: {usage.wall_s:.2f} s wall, "
                f"{usage.cpu_s:.2f} s CPU, {usage.tree_bytes / MB:.0f} MB",
                flush=True,
            )
    by_peer = {runner.peer: digests[runner.name] for runner in runners}
    gigatoken = by_peer.pop("gigatoken", "")
    expected = {digest for digest in by_peer.values() if digest}
    assert len(expected) <= 1, f"not the same ids: {digests}"
    if gigatoken and gigatoken not in (expected or {gigatoken}):
        print(
            "note: gigatoken by itself stores other ids "
            "(data_prep/tokenization/unicode_versions.py says why)"
        )
    return results


def _command(runner: Runner, corpus: Path, tokenizer: Path, out: str) -> list[str]:
    if runner.peer == "headway":
        script = str(HERE.parent / "data_prep" / "shard.py")
        options = {
            "input": corpus, "output": Path(out) / "set", "tokenizer": tokenizer,
            "workers": runner.workers, "validation-fraction": 0,
        }  # fmt: skip
        named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, script, *named]
    words = [str(HERE.parent), runner.peer, str(corpus), str(tokenizer), out, str(runner.workers)]
    return [sys.executable, "-c", PEER_CODE, *words]


def _threads(runner: Runner) -> Mapping[str, str]:
    """As many threads as the row says; those with processes get one thread in each."""
    is_threaded = runner.peer in ("tokenizers", "gigatoken")
    return {
        "RAYON_NUM_THREADS": str(runner.workers if is_threaded else 1),
        "TOKENIZERS_PARALLELISM": "true" if is_threaded else "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


def _digest(peer: str, out: Path) -> str:
    """Hash of all ids in order; empty for formats that are not read here."""
    digest = xxhash.xxh3_128()
    if peer == "headway":
        shards = ShardSet.open(out / "set", "train")
        for start in range(0, shards.num_tokens, 1 << 22):
            count = min(1 << 22, shards.num_tokens - start)
            digest.update(shards.read(start, count).tobytes())
        shards.close()
    elif peer in ("tokenizers", "gigatoken"):
        with pa.memory_map(str(out / "all.arrow")) as mapped:
            reader = pa.ipc.open_file(mapped)
            for number in range(reader.num_record_batches):
                column = reader.get_batch(number).column("tokens")
                digest.update(np.asarray(column.flatten()).tobytes())
    elif peer == "datasets":
        for path in sorted((out / "saved").glob("*.arrow")):
            with pa.memory_map(str(path)) as mapped:
                for batch in pa.ipc.open_stream(mapped):
                    digest.update(np.asarray(batch.column("tokens").flatten()).tobytes())
    else:
        return ""
    return digest.hexdigest()


def _section(corpus: Corpus, vocabulary: int, repeat: int, results: Results) -> str:
    """The Markdown between the markers of this size."""
    median = {runner: _median(usages) for runner, usages in results.items()}
    floor = median.get(Runner(FLOOR, 2))
    size = corpus.text_bytes / MB
    lines = [
        f"{_processor()}, {os.cpu_count()} threads, busy with other work; {_versions()}; "
        f"{date.today().isoformat()}. {corpus.documents:,} documents, {size:.1f} MB of "
        f"text, vocabulary {vocabulary:,} ({EOS} behind each document); medians of {repeat}.",
        "",
        "| | wall s | CPU s | MB/s wall | MB/s CPU | wall, times the floor | CPU, times the floor "
        "| memory, all MB | largest process MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for runner, usage in median.items():
        times = ["", ""]
        if floor:
            times = [f"{floor.wall_s / usage.wall_s:.1f}", f"{floor.cpu_s / usage.cpu_s:.1f}"]
        cells = [
            runner.name, f"{usage.wall_s:.2f}", f"{usage.cpu_s:.2f}",
            f"{size / usage.wall_s:.0f}", f"{size / usage.cpu_s:.0f}", *times,
            f"{usage.tree_bytes / MB:.0f}", f"{usage.process_bytes / MB:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _median(usages: Sequence[Usage]) -> Usage:
    """Each figure's own median."""
    return Usage(
        statistics.median(usage.wall_s for usage in usages),
        statistics.median(usage.cpu_s for usage in usages),
        int(statistics.median(usage.tree_bytes for usage in usages)),
        int(statistics.median(usage.process_bytes for usage in usages)),
    )


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else "unknown processor"


def _versions() -> str:
    names = ("tokenizers", "gigatoken", "datasets", "pyarrow", "orjson")
    return ", ".join(f"{name} {version(name)}" for name in names)


def _write(output: Path, section: str, megabytes: int, results: Results) -> None:
    """Replace the section of this size in README.md, and write results/data_prep-SIZE.json."""
    readme = output / "README.md"
    begin, end = (f"<!-- data_prep {megabytes} {word} -->" for word in ("begin", "end"))
    text = readme.read_text()
    if begin not in text:
        text += f"\n### {megabytes} MB\n\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    readme.write_text(f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}")
    raw = {
        "date": date.today().isoformat(),
        "hardware": _processor(),
        "versions": _versions(),
        "runs": [
            asdict(runner) | {"runs": [usage._asdict() for usage in usages]}
            for runner, usages in results.items()
        ],
    }
    folder = output / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"data_prep-{megabytes}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
