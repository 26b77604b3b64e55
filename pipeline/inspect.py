"""Look at checkpoints: python -m pipeline.inspect CHECKPOINT|RUN [--verify].

Of a checkpoint: step, tokens, layout, data position, sizes, health. Of a run: all its checkpoints,
and the newest of them in full. Sizes are always compared with the manifest; --verify reads every
file and compares its checksum. Needs no GPU and no other rank. Exit code 1 when something is
missing or damaged, 2 when there is no checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.command_line import exit_status
from model.errors import CheckpointError
from pipeline.checkpoint.file_names import PARTIAL, WEIGHTS, committed, step_of
from pipeline.checkpoint.files import (
    checkpoint_path,
    newest_checkpoint,
    read_manifest,
    size_problems,
    verify,
)
from pipeline.checkpoint.train_state import TrainState, read_state

EPILOG = """\
examples:
  PROG runs/7b
  PROG runs/7b/checkpoints/step_00005000 --verify

exit status: 0 all is whole, 1 something is missing or damaged, 2 there is no checkpoint, or wrong
arguments, 130 after Ctrl-C
"""
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.inspect") -> int:
    """Run the command; give its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument(
        "path", type=Path, metavar="CHECKPOINT|RUN", help="a checkpoint's or a run's folder"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare its checksum"
    )
    given = parser.parse_args(arguments)
    return exit_status(lambda: _show(given.path, verified=given.verify), CheckpointError, failed=2)


def _show(path: Path, *, verified: bool) -> int:
    """Print what a path names; the exit code."""
    chosen = checkpoint_path(path)
    check = verify if verified else size_problems
    paths = [chosen] if chosen == path else committed(chosen.parent)
    problems = {path: check(path) or _state_problems(path) for path in paths}
    if chosen != path:
        print("\n".join(describe_run(chosen.parent, problems)), end="\n\n")
    print("\n".join(describe(chosen, problems[chosen], verified=verified)))
    return 1 if any(problems.values()) else 0


def describe_run(directory: Path, problems: dict[Path, list[str]]) -> list[str]:
    """All checkpoints below a run's checkpoints folder, a line each, oldest first.

    Args:
        directory: the folder.
        problems: what is wrong with each.
    """
    newest = newest_checkpoint(directory)
    states = {path: _state(path) for path in problems}
    losses = {path: state.eval_loss if state else None for path, state in states.items()}
    judged = {path: loss for path, loss in losses.items() if loss is not None}
    best = min(judged, key=lambda path: (judged[path], -(step_of(path) or 0)), default=None)
    lines = [f"{directory}: {len(problems)} checkpoints"]
    for path, found in problems.items():
        loss = losses[path]
        remarks = [f"validation loss {loss:.4f}"] if loss is not None else []
        remarks += ["best"] if path == best else []
        remarks += ["latest"] if path == newest else []
        remarks += [f"DAMAGED: {found[0]}"] if found else []
        lines.append(f"  {path.name}  {_size(_bytes(path)):>10}  {', '.join(remarks)}".rstrip())
    for path in sorted(directory.iterdir()):
        if path.name.endswith(PARTIAL) and path.is_dir():
            lines.append(f"  {path.name}: being written or deleted, or left by a kill; never used")
        elif path.name.startswith("superseded_"):
            lines.append(f"  {path.name}: left behind by a run that went back; may be deleted")
    return lines


def describe(checkpoint: Path, problems: Sequence[str], *, verified: bool) -> list[str]:
    """A checkpoint for a person, line by line.

    Args:
        checkpoint: its folder.
        problems: what is wrong with it.
        verified: whether its contents were compared, too, and not only sizes.
    """
    state = _state(checkpoint)
    lines = [f"checkpoint    {checkpoint}"]
    if state is not None:
        lines += _progress(state)
    lines += _files(checkpoint)
    checked = "every checksum" if verified else "sizes; --verify reads every file"
    if problems:
        lines += [f"health        DAMAGED: {problem}" for problem in problems]
    else:
        lines.append(f"health        whole ({checked})")
    return lines


def _progress(state: TrainState) -> list[str]:
    layout = state.layout
    lines = [
        f"step          {state.step:,}, of which {state.skipped_steps:,} were skipped",
        f"tokens        {state.tokens:,}",
        f"data          next sample {state.next_sample:,} of sequences of "
        f"{state.sequence_length:,} tokens, seed {state.data_seed}, shard set "
        f"{state.data_fingerprint or 'unknown'}",
        f"layout        {layout.world_size} ranks = {layout.data} data x "
        f"{layout.tensor} tensor x {layout.stages} stages, ZeRO {layout.zero}, "
        f"{layout.precision}",
    ]
    if state.samples_by_source:
        counts = ", ".join(f"{name} {n:,}" for name, n in state.samples_by_source.items())
        lines.append(f"sources       samples of {counts}")
    if state.eval_loss is not None:
        lines.append(f"validation    loss {state.eval_loss:.6f}")
    return lines


def _files(checkpoint: Path) -> list[str]:
    try:
        entries = read_manifest(checkpoint)
    except CheckpointError:
        return []
    ranks = [entry.size for name, entry in entries.items() if name.startswith(f"{WEIGHTS}/")]
    total = sum(entry.size for entry in entries.values())
    return [
        f"files         {len(entries)}, {_size(total)}: {len(ranks)} of ranks, "
        f"{_size(min(ranks, default=0))} to {_size(max(ranks, default=0))}"
    ]


def _state(checkpoint: Path) -> TrainState | None:
    """The progress in a checkpoint; None when it cannot be read."""
    try:
        return read_state(checkpoint)
    except CheckpointError:
        return None


def _state_problems(checkpoint: Path) -> list[str]:
    """Why the progress in a checkpoint cannot be read, if it cannot."""
    try:
        read_state(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    return []


def _bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _size(count: float) -> str:
    """A number of bytes for a person."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
