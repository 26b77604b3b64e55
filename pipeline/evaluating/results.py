"""Figures of an evaluation as tables for a person and as JSON for a program."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foundation.durable_files import sync_folder, write_whole
from pipeline.evaluating.decoding import Decoded
from pipeline.evaluating.held_out import HeldOut
from pipeline.evaluating.pass_at_k import Sample

ALL = "all"


def held_out_tables(
    by_kind: Mapping[str, HeldOut], total: HeldOut, decoded: Mapping[str, Decoded]
) -> list[str]:
    """Lines about held-out text.

    Args:
        by_kind: figures of each kind of text.
        total: of all.
        decoded: what decoding took, by kind.
    """
    rows = dict(by_kind) if len(by_kind) == 1 else {**by_kind, ALL: total}
    heads = len(total.losses)
    titles = [f"head {head}" for head in range(1, heads + 1)]
    loss = [["loss, nats per token", "documents", "tokens", *titles]]
    per_byte = [["bits per byte", "bytes", *titles]]
    forward = [
        [
            "tokens per forward",
            *(f"{head} heads" for head in range(2, heads + 1)),
            *("realised", "prompts", "tokens/s"),
        ]
    ]
    for name, row in rows.items():
        loss.append([name, f"{row.documents:,}", f"{row.tokens[0]:,}", *_numbers(row.losses, 4)])
        per_byte.append([name, f"{row.text_bytes[0]:,}", *_numbers(row.bits_per_byte, 4)])
        real = decoded.get(name)
        shown = ["-"] * 3
        if real is not None:
            shown = [
                f"{real.tokens_per_forward:.2f}",
                str(real.prompts),
                f"{real.tokens_per_s:.1f}",
            ]
        forward.append([name, *_numbers(row.tokens_per_forward[1:], 2), *shown])
    tables = [loss, per_byte] if heads == 1 else [loss, per_byte, forward]
    return [line for table in tables for line in ("", *_table(table))]


def pass_table(means: Mapping[int, float], samples: Sequence[Sample]) -> list[str]:
    """Lines about problems."""
    problems = len({sample.task_id for sample in samples})
    right = sum(sample.passed for sample in samples)
    reasons: dict[str, int] = {}
    for sample in samples:
        if not sample.passed:
            kind = sample.reason.partition(":")[0]
            reasons[kind] = reasons.get(kind, 0) + 1
    common = sorted(reasons.items(), key=lambda item: -item[1])[:5]
    lines = ["", f"{problems:,} problems, {len(samples):,} completions, {right:,} right"]
    lines += [f"pass@{k:<4} {mean:8.2%}" for k, mean in means.items()]
    if common:
        lines.append("not right: " + ", ".join(f"{kind} {count:,}" for kind, count in common))
    return lines


def harness_table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines about the tasks of the harness, a metric each."""
    rows = [["task", "metric", "value", "standard error"]]
    for task, metrics in found.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in name:
                base, _, rest = name.partition(",")
                error = metrics.get(f"{base}_stderr" + (f",{rest}" if rest else ""))
                shown = f"{error:.4f}" if isinstance(error, float) else "-"
                rows.append([task, name, f"{value:.4f}", shown])
    return ["", *_table(rows)]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write figures, as a whole or not at all; NaN becomes null.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


@contextmanager
def sample_file(path: Path | None) -> Iterator[Callable[[Sequence[Sample]], None]]:
    """A function that writes completions and verdicts as JSON lines, as they come; None: nowhere.

    They go into PATH.partial, which is on the disk after each call and gets its name at the end:
    an evaluation that is killed loses nothing that was finished.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None:
        yield lambda samples: None
        return
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:

        def write(samples: Sequence[Sample]) -> None:
            for sample in samples:
                file.write(json.dumps(sample._asdict(), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

        yield write
    partial.replace(path)
    sync_folder(path.parent)


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _realised(decoded: Decoded | None) -> list[str]:
    if decoded is None:
        return ["-"] * 3
    return [
        f"{decoded.tokens_per_forward:.2f}",
        str(decoded.prompts),
        f"{decoded.tokens_per_s:.1f}",
    ]


def _numbers(values: Sequence[float], digits: int) -> list[str]:
    return ["-" if math.isnan(value) else f"{value:.{digits}f}" for value in values]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under one another: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
