"""Memory and time of a training step: the whole model, or its extra heads on a frozen trunk.

`python benchmarks/frozen_trunk.py [--quick] [--device auto|cpu|cuda]` measures every point in a
process of its own, prints the table, and writes it to README.md beside this file.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.memory_vs_heads import hardware, in_own_process, versions
from benchmarks.workload import Measurement, Mode, Point, Workload
from model.config import ModelConfig
from model.structure.freezing import is_trained
from model.structure.parameter_shapes import parameter_shapes

MODES: tuple[Mode, ...] = ("sequential", "frozen")
TIMED_STEPS = 5
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="frozen_trunk.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; prints, writes nothing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    width, length, vocabulary = (64, 32, 512) if options.quick else (512, 512, 32 * 1024)
    rows = []
    for layers in (6, 12):
        workload = Workload(layers, width, batch=2, sequence=length, chunk_tokens=256)
        for heads in (2, 4):
            whole, frozen = (
                in_own_process(workload, Point(vocabulary, heads, mode), device, TIMED_STEPS)
                for mode in MODES
            )
            rows.append(_row(workload, Point(vocabulary, heads, "frozen"), whole, frozen))
            print(rows[-1], file=sys.stderr, flush=True)
    section = "\n".join(
        [
            f"{hardware(device)}; {versions()}; {date.today().isoformat()}. Hidden size {width}, "
            f"vocabulary {vocabulary}, 2 x {length} tokens, "
            f"{'bf16' if device == 'cuda' else 'fp32'}; MiB, all trained -> frozen.",
            "",
            "| layers in all | n | saved | peak | frozen / all, peak | optimizer's memory "
            "| frozen / all, time |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    print(section)
    if not options.quick:
        _write(Path(__file__).with_name("README.md"), section, device)


def _row(workload: Workload, point: Point, whole: Measurement, frozen: Measurement) -> str:
    assert whole.step_s is not None
    assert frozen.step_s is not None
    config = ModelConfig(
        layers=workload.layers,
        hidden_size=workload.hidden_size,
        attention_heads=workload.hidden_size // 64,
        vocab_size=point.vocabulary,
        future_tokens=point.heads,
    )
    shapes = {name: torch.Size(shape) for name, shape in parameter_shapes(config).items()}
    trained = sum(shape.numel() for name, shape in shapes.items() if is_trained(name, "trunk"))
    remembered = [8 * config.num_parameters(), 8 * trained]
    cells = [
        str(workload.layers),
        str(point.heads),
        f"{whole.saved_bytes / MIB:.0f} -> {frozen.saved_bytes / MIB:.0f}",
        f"{whole.peak_bytes / MIB:.0f} -> {frozen.peak_bytes / MIB:.0f}",
        f"{frozen.peak_bytes / max(whole.peak_bytes, 1):.2f}",
        " -> ".join(f"{size / MIB:.0f}" for size in remembered),
        f"{frozen.step_s / whole.step_s:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _write(readme: Path, section: str, device: str) -> None:
    begin, end = (f"<!-- frozen_trunk {device} {word} -->" for word in ("begin", "end"))
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{readme} has no lines {begin} and {end}"
    readme.write_text(f"{before}{begin}\n{section}\n{end}{after}")


if __name__ == "__main__":
    main()
