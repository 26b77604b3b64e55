"""Memory and time of reading a Hugging Face Llama: tensor by tensor, or the whole model at once.

`python benchmarks/import_llama.py [--quick]` writes Llamas of the same width and different depths
to a temporary folder and reads each in a fresh process: *streamed* gives every parameter of a run
with 4 heads as `train.init_from` does, one at a time; *whole* is `from_pretrained`. It prints the
table and writes it to README.md beside this file. Files are read once before, so that no disk is
measured.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.memory_vs_heads import hardware
from model.config import ModelConfig
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from model.structure.parameter_shapes import parameter_shapes

MIB = 2**20
HEADS = 4
BEGIN, END = (f"<!-- import_llama cpu {word} -->" for word in ("begin", "end"))


class Reading(NamedTuple):
    """What reading a model took: growth of the resident set at its peak, and time."""

    peak_bytes: int
    seconds: float


class Row(NamedTuple):
    """One depth: bytes of all files and of the largest tensor in fp32, and both readings."""

    layers: int
    file_bytes: int
    largest_bytes: int
    streamed: Reading
    whole: Reading


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="import_llama.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints, writes nothing")
    options = parser.parse_args(arguments)
    width, vocabulary, depths = (64, 512, (2, 4)) if options.quick else (1024, 32000, (6, 12, 24))
    rows = []
    for layers in depths:
        with tempfile.TemporaryDirectory() as folder:
            write_llama(Path(folder), layers, width, vocabulary)
            rows.append(measure(Path(folder), layers))
        print(rows[-1], flush=True)
    section = table(rows, width, vocabulary)
    print(section)
    if not options.quick:
        write(Path(__file__).with_name("README.md"), section)


def write_llama(directory: Path, layers: int, width: int, vocabulary: int) -> None:
    """A Llama of random weights, in bf16, in several files."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    transformers.utils.logging.disable_progress_bar()
    llama = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    llama.save_pretrained(directory, max_shard_size="200MB")


def measure(directory: Path, layers: int) -> Row:
    """Read a folder in both ways, each in a process of its own."""
    files = list(directory.glob("*.safetensors"))
    for path in files:
        path.read_bytes()
    config = _run_config(LlamaFolder(directory))
    sizes = (torch.Size(shape).numel() * 4 for shape in parameter_shapes(config).values())
    return Row(
        layers,
        sum(path.stat().st_size for path in files),
        max(sizes),
        _in_own_process(_read_streamed, directory),
        _in_own_process(_read_whole, directory),
    )


def _run_config(folder: LlamaFolder) -> ModelConfig:
    return ModelConfig.model_validate(
        folder.sizes.keys
        | {
            "layers": folder.sizes.layers - 1 + HEADS,
            "vocab_size": folder.sizes.vocab_size,
            "future_tokens": HEADS,
        }
    )


def _read_streamed(directory: Path) -> Reading:
    base, started = _resident_peak(), time.perf_counter()
    folder = LlamaFolder(directory)
    config = _run_config(folder)
    folder.check(config)
    source = ImportedWeights(folder, config)
    for name in parameter_shapes(config):
        source(name, _nothing_fresh)
    return Reading(_resident_peak() - base, time.perf_counter() - started)


def _nothing_fresh() -> torch.Tensor:
    raise AssertionError("every parameter is in the folder")


def _read_whole(directory: Path) -> Reading:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = transformers.LlamaForCausalLM  # imported by this, before the clock starts
    base, started = _resident_peak(), time.perf_counter()
    model = kind.from_pretrained(directory, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    return Reading(_resident_peak() - base, time.perf_counter() - started)


def _in_own_process(read: Callable[[Path], Reading], directory: Path) -> Reading:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, read, directory))
    process.start()
    sender.close()
    result: Reading = receiver.recv()
    process.join()
    return result


def _child(sender: Connection, read: Callable[[Path], Reading], directory: Path) -> None:
    sender.send(read(directory))


def _resident_peak() -> int:
    """Peak of this program alone; getrusage would count the parent's before it was started."""
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def table(rows: Sequence[Row], width: int, vocabulary: int) -> str:
    """The Markdown between the markers."""
    lines = [
        f"{hardware('cpu')}; torch {torch.__version__}, transformers {version('transformers')}; "
        f"{date.today().isoformat()}. Hidden size {width}, vocabulary {vocabulary}, bf16 files "
        "read as fp32.",
        "",
        "| layers | files, MiB | largest tensor, MiB | peak streamed, MiB | peak whole, MiB "
        "| streamed / whole | time, streamed / whole |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            str(row.layers),
            *(f"{size / MIB:.0f}" for size in (row.file_bytes, row.largest_bytes)),
            *(f"{reading.peak_bytes / MIB:.0f}" for reading in (row.streamed, row.whole)),
            f"{row.streamed.peak_bytes / max(row.whole.peak_bytes, 1):.2f}",
            f"{row.streamed.seconds / row.whole.seconds:.2f}",
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
