"""A run's figures in a table: what reports and model cards end with."""

import statistics
from collections.abc import Sequence

from pipeline.reporting.metrics import Scalars
from pipeline.reporting.progress import clock


def final_figures(records: Sequence[Scalars], num_heads: int) -> list[tuple[str, str]]:
    """Name and value of each figure that the records hold, the last or the median of them."""
    last = records[-1]
    rows = [("Steps", f"{last['step']:,}")]
    if last.get("tokens") is not None:
        rows.append(("Tokens trained on", f"{last['tokens']:,}"))
    for name, key in (("Training loss", "loss_head_"), ("Held-out loss", "eval_loss_head_")):
        for head in range(1, num_heads + 1):
            values = values_of(records, f"{key}{head}")
            if values:
                rows.append((f"{name}, head {head}", f"{values[-1]:.4f} (first {values[0]:.4f})"))
    for name, key, form in (
        ("Held-out tokens per forward", "eval_tokens_per_forward", ".2f"),
        ("Final learning rate", "learning_rate", ".3g"),
    ):
        values = values_of(records, key)
        if values:
            rows.append((name, f"{values[-1]:{form}}"))
    for name, key, form in (
        ("Tokens per second, median", "tokens_per_s", ",.0f"),
        ("Model FLOPS utilization, median", "mfu", ".1%"),
    ):
        values = values_of(records, key)
        if values:
            rows.append((name, f"{statistics.median(values):{form}}"))
    if memory := values_of(records, "memory_peak_gib"):
        rows.append(("Peak memory", f"{max(memory):.2f} GiB"))
    if times := values_of(records, "step_time_s"):
        rows.append(("Time per step, median", f"{statistics.median(times):.3f} s"))
        rows.append(("Time in reported steps", clock(sum(times))))
    if skipped := sum(1 for record in records if record.get("skipped")):
        rows.append(("Skipped steps", str(skipped)))
    return rows


def values_of(records: Sequence[Scalars], key: str) -> list[float]:
    """A figure in all records that have it."""
    return [float(value) for record in records if (value := record.get(key)) is not None]
