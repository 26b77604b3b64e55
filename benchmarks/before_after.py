"""Time and memory of a training step in two trees of this project, measured in turn.

`python benchmarks/before_after.py BEFORE [--rounds N] [--dtype fp32 bf16] [--device cpu]` compares
the tree that this file is in with the one in the folder BEFORE (`git worktree add BEFORE COMMIT`).
Each tree has a process of its own with the same model and tokens; steps alternate between the two,
so that other work on the machine falls on both alike. On a CPU one thread computes, and what it
computed counts, not what it waited for others. Printed: the median of each and of the ratios of
neighbouring steps, and the bytes that autograd kept for backward.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_READY = "ready"


class Size(NamedTuple):
    """What both trees train: L layers of H, 4 of them heads, one sequence of S tokens."""

    layers: int = 12
    hidden_size: int = 512
    sequence: int = 512
    vocabulary: int = 8192


class Tree:
    """A process in which one tree's model takes steps when it is told to.

    Args:
        folder: the tree.
        size: of the model.
        dtype: `fp32` or `bf16`.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, size: Size, dtype: str, device: str) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(Path(__file__).resolve()),
                "--worker",
                str(folder),
            ],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[str] = self._process.stdin
        self._from: IO[str] = self._process.stdout
        self.saved_bytes = int(self._ask(json.dumps([size._asdict(), dtype, device])))

    def step(self) -> float:
        """Seconds of one forward and backward."""
        return float(self._ask("step"))

    def close(self) -> None:
        """End the process."""
        self._to.close()
        self._process.wait()

    def _ask(self, line: str) -> str:
        self._to.write(line + "\n")
        self._to.flush()
        for answer in self._from:
            if answer.startswith(_READY):  # libraries print, too
                return answer.removeprefix(_READY)
        raise RuntimeError(f"the process of {self._process.args!r} has ended")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="before_after.py")
    parser.add_argument("before", type=Path, help="the folder of the other tree")
    parser.add_argument("--rounds", type=int, default=11, help="steps of each tree (11)")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden-size", type=int, default=Size().hidden_size)
    parser.add_argument("--sequence", type=int, default=Size().sequence)
    options = parser.parse_args(arguments)
    size = Size(hidden_size=options.hidden_size, sequence=options.sequence)
    for dtype in options.dtype:
        folders = (options.before.resolve(), ROOT)
        print(compare(folders, size, dtype, options.device, options.rounds), flush=True)
    return 0


def compare(folders: tuple[Path, Path], size: Size, dtype: str, device: str, rounds: int) -> str:
    """One line: both trees' steps, their ratio, and what is kept for backward."""
    trees = [Tree(folder, size, dtype, device) for folder in folders]
    try:
        pairs = []
        for index in range(rounds):
            # The tree that begins changes, since a step heats caches for the next.
            first, second = trees if index % 2 == 0 else trees[::-1]
            seconds = {first: first.step(), second: second.step()}
            pairs.append((seconds[trees[0]], seconds[trees[1]]))
    finally:
        for tree in trees:
            tree.close()
    ratios = sorted(after / before for before, after in pairs)
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    quarter = len(ratios) // 4
    kept = [tree.saved_bytes / 2**20 for tree in trees]
    return (
        f"{dtype}, {device}: {before * 1e3:.0f} -> {after * 1e3:.0f} ms, ratio "
        f"{statistics.median(ratios):.3f} (quartiles {ratios[quarter]:.3f} to "
        f"{ratios[-1 - quarter]:.3f}); kept for backward {kept[0]:.0f} -> {kept[1]:.0f} MiB, "
        f"{kept[1] / kept[0]:.2f}"
    )


def work() -> None:
    """The process of one tree: build, then a step for each line."""
    import time

    import torch

    from benchmarks.saved_tensors import SavedTensorMeter
    from model.backward import sequential_backward
    from model.config import ModelConfig
    from model.language_model import MultiTokenModel
    from model.structure.process_groups import ensure_single_process

    sizes, dtype, device_type = json.loads(sys.stdin.readline())
    size, device = Size(**sizes), torch.device(device_type)
    clock = time.perf_counter if device_type == "cuda" else time.process_time
    ensure_single_process()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        layers=size.layers,
        hidden_size=size.hidden_size,
        attention_heads=size.hidden_size // 64,
        vocab_size=size.vocabulary,
        future_tokens=4,
    )
    model = MultiTokenModel(config, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(std=0.02)
    model.to(device)
    if hasattr(model, "choose_attention"):
        model.choose_attention("auto", device)
    tokens = torch.randint(0, size.vocabulary, (1, size.sequence), device=device)
    labels = torch.randint(0, size.vocabulary, (4, 1, size.sequence), device=device)
    scales = torch.full((4,), 1 / size.sequence, device=device)

    def step() -> None:
        model.zero_grad()
        result = sequential_backward(model, model(tokens), labels, scales, chunk_tokens=4096)
        result.surrogate_loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with SavedTensorMeter(excluded=model.parameters()) as meter:
        step()
    print(f"{_READY}{meter.peak}", flush=True)
    for _line in sys.stdin:
        started = clock()
        step()
        print(f"{_READY}{clock() - started}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path[0] = sys.argv[2]
        work()
        sys.exit()
    sys.exit(main())
