"""Attention over sequences of several documents: time and size of the mask, as bias and as blocks.

`python benchmarks/document_mask.py [--quick] [--device auto|cpu|cuda]` takes the three forms of
core attention in turn on the same sequences: the plain causal one, and documents apart with either
form of the mask. It compares what the two give, prints the table, and writes it to README.md beside
this file. On a GPU it measures forward and backward; on a CPU torch's flex attention has no
backward, and training takes the bias.

Legend: B batch, S sequence, A attention heads, G key-value heads, D head dimension.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.memory_vs_heads import hardware
from model.operations.attention import attend, attend_blocks
from model.operations.documents import AttentionMask, bias_within, blocks_within

ATTENTION_HEADS, KV_HEADS, HEAD_DIM, MEAN_DOCUMENT = 8, 2, 64, 512
MIB = 2**20


class Inputs(NamedTuple):
    """Query `[S, B, A, D]`, key and value `[S, B, G, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor


class Row(NamedTuple):
    """What one sequence length took.

    Attributes:
        length: S.
        mask_bytes: of bias and of blocks.
        seconds: of the causal attention, and with bias and with blocks.
        difference: largest one between the outputs with bias and with blocks.
    """

    length: int
    mask_bytes: tuple[int, int]
    seconds: tuple[float, float, float]
    difference: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="document_mask.py")
    parser.add_argument("--quick", action="store_true", help="short sequences; writes no files")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = (300, 600) if options.quick else (1024, 2048, 4096, 8192)
    rows = []
    for length in lengths:
        rows.append(measure(length, torch.device(device), repeats=3 if options.quick else 5))
        print(rows[-1], file=sys.stderr, flush=True)
    section = _section(rows, device)
    print(section)
    if not options.quick:
        _write(Path(__file__).resolve().parent / "README.md", section, device)
    return 0


def measure(length: int, device: torch.device, *, repeats: int) -> Row:
    """One sequence of `length` tokens, all forms in turn, `repeats` times after a first call."""
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(1, length, generator=generator) < 1 / MEAN_DOCUMENT
    documents = starts.cumsum(1, dtype=torch.int32).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = Inputs(
        *(
            torch.randn(length, 1, heads, HEAD_DIM, generator=generator).to(device, dtype)
            for heads in (ATTENTION_HEADS, KV_HEADS, KV_HEADS)
        )
    )
    bias, blocks = bias_within(documents, dtype), blocks_within(documents)
    forms: tuple[AttentionMask | None, ...] = (None, bias, blocks)
    step = _forward_backward if device.type == "cuda" else _forward
    outputs = [step(inputs, form) for form in forms]  # compiles, too
    seconds: list[list[float]] = [[] for _ in forms]
    for _ in range(repeats):
        for found, form in zip(seconds, forms, strict=True):
            found.append(_timed(step, inputs, form, device))
    causal_s, bias_s, blocks_s = map(statistics.median, seconds)
    return Row(
        length,
        (bias.nbytes, _block_bytes(blocks)),
        (causal_s, bias_s, blocks_s),
        max(
            float((ours - theirs).abs().max())
            for ours, theirs in zip(outputs[1], outputs[2], strict=True)
        ),
    )


def _forward(inputs: Inputs, mask: AttentionMask | None) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(mask, BlockMask):
            return [attend_blocks(*inputs, mask, compiled=True)]
        return [attend(*inputs, mask)]


def _forward_backward(inputs: Inputs, mask: AttentionMask | None) -> list[Tensor]:
    leaves = Inputs(*(tensor.detach().requires_grad_() for tensor in inputs))
    output = attend(*leaves, mask)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]


def _timed(
    step: Callable[[Inputs, AttentionMask | None], list[Tensor]],
    inputs: Inputs,
    mask: AttentionMask | None,
    device: torch.device,
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was launched before is not this step's
    started = time.perf_counter()
    step(inputs, mask)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _block_bytes(mask: BlockMask) -> int:
    return sum(part.nbytes for part in mask.as_tuple() if isinstance(part, Tensor))


def _section(rows: Sequence[Row], device: str) -> str:
    """The Markdown between a device's markers."""
    lines = [
        f"{hardware(device)}; torch {torch.__version__}; {date.today().isoformat()}. One sequence, "
        f"{ATTENTION_HEADS} attention and {KV_HEADS} key-value heads of {HEAD_DIM}, documents of "
        f"{MEAN_DOCUMENT} tokens on average, "
        f"{'bf16, forward and backward' if device == 'cuda' else 'fp32, forward alone'}.",
        "",
        "| S | mask as bias, MiB | mask as blocks, MiB | causal, ms | bias / causal "
        "| blocks / causal | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bias, blocks = (size / MIB for size in row.mask_bytes)
        causal_s, bias_s, blocks_s = row.seconds
        lines.append(
            f"| {row.length} | {bias:.1f} | {blocks:.3f} | {1000 * causal_s:.1f} "
            f"| {bias_s / causal_s:.2f} | {blocks_s / causal_s:.2f} | {row.difference:.1e} |"
        )
    return "\n".join(lines)


def _write(readme: Path, section: str, device: str) -> None:
    """Replace the device's section of README.md."""
    begin, end = (f"<!-- document_mask {device} {word} -->" for word in ("begin", "end"))
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{readme} has no lines {begin} and {end}"
    readme.write_text(f"{before}{begin}\n{section}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
