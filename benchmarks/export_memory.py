"""Memory and time of an export, checked layer by layer or also with whole models.

`python benchmarks/export_memory.py [--quick]` writes checkpoints of random weights, of the same
width and different depths, as four ranks would, and exports each in a fresh process, twice: checked
*by layers* as large models are, and with *whole models* too, as small ones are. It prints the table
and writes it to README.md beside this file.
"""

import argparse
import importlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import pipeline.export
import pipeline.exporting.exporter
from benchmarks.memory_vs_heads import hardware
from data_prep.tokenization.tokenizer import bytes_tokenizer
from foundation.durable_files import write_synced
from model.config import ModelConfig
from model.structure.parameter_shapes import layer_shapes, parameter_shapes
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME, STATE_NAME, TOKENIZER, WEIGHTS
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.sharded_tensors import Snapshot, run_key
from pipeline.checkpoint.train_state import Layout, TrainState
from pipeline.config.run_config import RunConfig, to_yaml

MIB = 2**20
RANKS = 4
SAMPLE_S = 0.005
BEGIN, END = (f"<!-- export_memory cpu {word} -->" for word in ("begin", "end"))


class Export(NamedTuple):
    """What one export took: growth of the process's own memory at its peak, and time."""

    peak_bytes: int
    seconds: float


class Row(NamedTuple):
    """One depth: the model in fp32, one of its layers, its largest matrix, and both exports."""

    layers: int
    model_bytes: int
    layer_bytes: int
    largest_bytes: int
    by_layers: Export
    whole: Export


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="export_memory.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints, writes nothing")
    options = parser.parse_args(arguments)
    width, vocabulary, depths = (64, 512, (4, 6)) if options.quick else (1024, 32000, (6, 12, 24))
    rows = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as name:
            config = run_config(Path(name) / "run", layers, width, vocabulary)
            write_checkpoint(config)
            rows.append(measure(config, Path(name) / "export"))
        print(rows[-1], flush=True)
    section = table(rows, width, vocabulary)
    print(section)
    if not options.quick:
        write(Path(__file__).with_name("README.md"), section)


def run_config(run_dir: Path, layers: int, width: int, vocabulary: int) -> RunConfig:
    """A run of a model with three heads."""
    sizes = {
        "layers": layers,
        "hidden_size": width,
        "attention_heads": width // 64,
        "ffn_hidden_size": width * 11 // 4,
        "vocab_size": vocabulary,
        "future_tokens": 3,
    }
    return RunConfig.model_validate(
        {
            "run": {"name": "benchmark", "dir": run_dir},
            "model": sizes,
            "data": {"shards": "none", "sequence_length": 256},
            "batch": {"micro_size": 1},
            "train": {"steps": 1, "precision": "bf16"},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"warmup_steps": 1},
        }
    )


def write_checkpoint(config: RunConfig) -> None:
    """Commit random weights, each rank with a run of every parameter; moments are left out."""
    layout = Layout(world_size=RANKS, data=RANKS, tensor=1, stages=1, zero=1, precision="bf16")
    state = TrainState(step=1, data_fingerprint="", data_seed=0, sequence_length=256, layout=layout)

    folder = CheckpointFolder(config.run.dir, config.checkpoint)
    partial, entries = folder.prepare(1), {}
    for rank in range(RANKS):
        runs = {}
        for name, shape in parameter_shapes(config.model).items():
            size = torch.Size(shape).numel()
            start, stop = size * rank // RANKS, size * (rank + 1) // RANKS
            scale, mean = (0.0, 1.0) if len(shape) == 1 else (0.02, 0.0)
            runs[run_key("weight", name, start)] = torch.randn(stop - start) * scale + mean
        snapshot = Snapshot(rank, 0, 1, 1, runs)
        entries[f"{WEIGHTS}/{snapshot.file_name}"] = snapshot.write(partial / WEIGHTS)
    for name, content in (
        (STATE_NAME, state.to_json().encode()),
        (RESOLVED_CONFIG_NAME, to_yaml(config).encode()),
        (TOKENIZER, bytes_tokenizer()),
    ):
        entries[name] = write_synced(partial / name, content)
    folder.commit(1, entries)


def measure(config: RunConfig, target: Path) -> Row:
    """Export one run in both ways, each in a process of its own."""
    model: ModelConfig = config.model
    layer = sum(torch.Size(shape).numel() for shape in layer_shapes(model).values())
    largest = max(torch.Size(shape).numel() for shape in parameter_shapes(model).values())
    return Row(
        model.layers,
        4 * model.num_parameters(),
        4 * layer,
        4 * largest,
        _in_own_process(config.run.dir, target, 0),
        _in_own_process(config.run.dir, target, 1 << 62),
    )


def _in_own_process(run_dir: Path, target: Path, whole_model_bytes: int) -> Export:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, run_dir, target, whole_model_bytes)
    process = context.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    assert process.pid is not None
    base = peak = int(receiver.recv())
    while not receiver.poll(SAMPLE_S):
        peak = max(peak, _own_bytes(process.pid))
    seconds = float(receiver.recv())
    process.join()
    return Export(peak - base, seconds)


def _child(sender: Connection, run_dir: Path, target: Path, whole_model_bytes: int) -> None:
    """Import everything, say how much memory that took, then export and say how long it took."""
    for name in (
        "model.hugging_face.loading",
        "pipeline.exporting.tensors",
        "pipeline.exporting.layer_by_layer",
    ):
        importlib.import_module(name)
    pipeline.exporting.exporter.WHOLE_MODEL_BYTES = whole_model_bytes
    sender.send(_own_bytes(None))
    started = time.perf_counter()
    pipeline.export.export(run_dir, target, report=lambda _: None)
    sender.send(time.perf_counter() - started)


def _own_bytes(pid: int | None) -> int:
    """A process's memory that is not a file's: pages of files are given back when others need."""
    status = Path(f"/proc/{pid or 'self'}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def table(rows: Sequence[Row], width: int, vocabulary: int) -> str:
    """The Markdown between the markers."""
    lines = [
        f"{hardware('cpu')}; torch {torch.__version__}, transformers {version('transformers')}; "
        f"{date.today().isoformat()}. Hidden size {width}, vocabulary {vocabulary}, 3 heads; "
        f"weights of {RANKS} ranks, exported in bf16.",
        "",
        "| layers | model in fp32, MiB | one layer, MiB | largest matrix, MiB "
        "| peak by layers, MiB | peak with whole models, MiB "
        "| by layers / model | by layers / whole | time, by layers / whole |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peaks = (row.by_layers.peak_bytes, row.whole.peak_bytes)
        sizes = (row.model_bytes, row.layer_bytes, row.largest_bytes, *peaks)
        cells = [
            str(row.layers),
            *(f"{size / MIB:.0f}" for size in sizes),
            f"{peaks[0] / row.model_bytes:.2f}",
            f"{peaks[0] / peaks[1]:.2f}",
            f"{row.by_layers.seconds / row.whole.seconds:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(readme: Path, section: str) -> None:
    """Put the table between its markers."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{readme} has no lines {BEGIN} and {END}"
    readme.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}")


if __name__ == "__main__":
    main()
