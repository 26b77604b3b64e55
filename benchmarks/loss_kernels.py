"""Time and memory of the loss of one head: chunked, whole logits, and Liger's fused kernel.

`python benchmarks/loss_kernels.py [--device cuda|cpu] [--tiny]` times loss and both gradients of
the same inputs, in turns; on a GPU, also with the softmax by torch.compile, as training has it by
default there. Liger (liger-kernel) needs a GPU and is measured where it is installed.

Legend: T tokens, H hidden, V vocabulary.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tables import machine_line
from model.loss import VocabularyShard, loss_and_gradients

TURNS = 5


class Problem(NamedTuple):
    """Inputs: `[T, H]`, `[V, H]`, `[T]`, and the fp32 sum of the weight's gradients `[V, H]`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    total: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="loss_kernels.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    tokens, hidden = (64, 32) if options.tiny else (16_384, 2048)
    vocabularies = (512, 1024) if options.tiny else (32_768, 131_072)
    lines = [
        machine_line(options.device, ("torch",)),
        "",
        f"{tokens} tokens, hidden size {hidden}; loss and both gradients, median of {TURNS}.",
        "",
        "| V | loss | ms | against whole logits | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for vocabulary in vocabularies:
        lines += _rows(_problem(tokens, hidden, vocabulary, options.device))
    print("\n".join(lines))
    return 0


def _problem(tokens: int, hidden: int, vocabulary: int, device: str) -> Problem:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=dtype) * 0.02
    labels = torch.randint(0, vocabulary, (tokens,), device=device)
    return Problem(x, weight, labels, torch.zeros(vocabulary, hidden, device=device))


def _rows(problem: Problem) -> list[str]:
    ways: dict[str, Callable[[Problem], None]] = {"whole logits": _whole}
    for chunk in (1024, 4096, 8192):
        ways[f"chunks of {chunk}"] = functools.partial(_chunked, chunk=chunk)
    if problem.hidden.is_cuda:
        torch.compiler.reset()  # a second shape of anything would be compiled for every shape
        compiled_whole = torch.compile(_whole_loss, dynamic=False)
        ways["whole logits, compiled"] = functools.partial(_whole, loss=compiled_whole)
        ways["chunks of 4096, compiled"] = functools.partial(_chunked, chunk=4096, is_compiled=True)
        if liger := _liger():
            ways["Liger, fused"] = liger
        else:
            print("Liger is not installed (liger-kernel)", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory = {}
    for turn in range(TURNS + 1):
        for name, run in list(ways.items()):
            try:
                seconds, memory[name] = _timed(run, problem)
            except torch.OutOfMemoryError:
                print(f"{name}: no memory", file=sys.stderr)
                del ways[name], times[name]
                continue
            if turn:
                times[name].append(seconds)
    whole = statistics.median(times["whole logits"]) if "whole logits" in times else None
    rows = []
    for name, seconds_of in times.items():
        median = statistics.median(seconds_of)
        extra_text = f"{memory[name] / 2**20:,.0f}" if problem.hidden.is_cuda else "-"
        size = problem.weight.shape[0]
        ratio = f"{median / whole:.2f}" if whole else "-"
        rows.append(f"| {size} | {name} | {median * 1000:.1f} | {ratio} | {extra_text} |")
    return rows


def _timed(run: Callable[[Problem], None], problem: Problem) -> tuple[float, int]:
    on_gpu = problem.hidden.is_cuda
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run(problem)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() - before if on_gpu else 0


def _chunked(problem: Problem, chunk: int, is_compiled: bool = False) -> None:
    """As training calls it."""
    loss_and_gradients(
        problem.hidden,
        problem.weight,
        problem.labels,
        shard=VocabularyShard(0, problem.weight.shape[0], None),
        scale=1.0 / len(problem.labels),
        weight_gradient=problem.total,
        chunk_tokens=chunk,
        is_compiled=is_compiled,
    )


def _whole_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.t()).float(), labels)


def _whole(problem: Problem, loss: Callable[..., Tensor] = _whole_loss) -> None:
    x, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    loss(x, weight, problem.labels).backward()
    assert weight.grad is not None
    problem.total.add_(weight.grad)


def _liger() -> Callable[[Problem], None] | None:
    """Liger's fused linear cross-entropy, where it is installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss: Any = LigerFusedLinearCrossEntropyLoss()

    def run(problem: Problem) -> None:
        x, weight = (t.detach().requires_grad_() for t in (problem.hidden, problem.weight))
        loss(weight, x, problem.labels).backward()
        assert weight.grad is not None
        problem.total.add_(weight.grad)

    return run


if __name__ == "__main__":
    sys.exit(main())
