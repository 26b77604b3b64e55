"""Look at checkpoints: python -m pipeline.inspect CHECKPOINT|RUN [--verify].

Of a checkpoint: step, tokens, layout, data position, sizes, health. Of a run: all its checkpoints,
and the newest of them in full. Sizes are always compared with the manifest; --verify reads every
file and compares its checksum. Needs no GPU and no other rank. Exit code 1 when something is
missing or damaged, 2 when there is no checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from pipeline.checkpoint.file_names import PARTIAL, STATE_NAME, WEIGHTS, committed, step_of
from pipeline.checkpoint.files import (
    checkpoint_path,
    newest_checkpoint,
    read_manifest,
    size_problems,
    verify,
)

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.inspect") -> int:
    """Run the command; give its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", type=Path, metavar="CHECKPOINT|RUN", help="a checkpoint's or a run's folder"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare its checksum"
    )
    given = parser.parse_args(arguments)
    try:
        chosen = checkpoint_path(given.path)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    check = verify if given.verify else size_problems
    if chosen == given.path:
        problems = {chosen: check(chosen)}
    else:
        problems = {path: check(path) for path in committed(chosen.parent)}
        print("\n".join(describe_run(chosen.parent, problems)), end="\n\n")
    print("\n".join(describe(chosen, problems[chosen], verified=given.verify)))
    return 1 if any(problems.values()) else 0


def describe_run(directory: Path, problems: dict[Path, list[str]]) -> list[str]:
    """All checkpoints below a run's checkpoints folder, a line each, oldest first.

    Args:
        directory: the folder.
        problems: what is wrong with each.
    """
    newest = newest_checkpoint(directory)
    losses = {path: _state(path).get("eval_loss") for path in problems}
    judged = {path: loss for path, loss in losses.items() if isinstance(loss, float)}
    best = min(judged, key=lambda path: (judged[path], -(step_of(path) or 0)), default=None)
    lines = [f"{directory}: {len(problems)} checkpoints"]
    for path, found in problems.items():
        loss = losses[path]
        remarks = [f"validation loss {loss:.4f}"] if isinstance(loss, float) else []
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
    layout = state.get("layout", {})
    lines = [f"checkpoint    {checkpoint}"]
    if state:
        lines += [
            f"step          {state['step']:,}, of which {state['skipped_steps']:,} were skipped",
            f"tokens        {state['tokens']:,}",
            f"data          next sample {state['next_sample']:,} of sequences of "
            f"{state['sequence_length']:,} tokens, seed {state['data_seed']}, shard set "
            f"{state['data_fingerprint'] or 'unknown'}",
            f"layout        {layout['world_size']} ranks = {layout['data']} data x "
            f"{layout['tensor']} tensor x {layout['stages']} stages, ZeRO {layout['zero']}, "
            f"{layout['precision']}",
        ]
    if state.get("samples_by_source"):
        counts = ", ".join(f"{name} {n:,}" for name, n in state["samples_by_source"].items())
        lines.append(f"sources       samples of {counts}")
    if state.get("eval_loss") is not None:
        lines.append(f"validation    loss {state['eval_loss']:.6f}")
    lines += _files(checkpoint)
    checked = "every checksum" if verified else "sizes; --verify reads every file"
    if problems:
        lines += [f"health        DAMAGED: {problem}" for problem in problems]
    else:
        lines.append(f"health        whole ({checked})")
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


def _state(checkpoint: Path) -> dict[str, Any]:
    """The progress in a checkpoint; empty when it cannot be read."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and "layout" in state else {}


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
