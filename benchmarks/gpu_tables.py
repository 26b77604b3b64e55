"""The tables of `benchmarks/gpu.sh`, from whatever has been measured."""

from dataclasses import fields
from typing import Any

from benchmarks.gpu_points import Point
from pipeline.config.run_config import RunConfig
from pipeline.planning.run_plan import run_memory

Found = dict[str, Any]


def line(row: Found) -> str:
    """A point on the screen."""
    if "error" in row:
        return f"  {row['size']} n={row['heads']}: {row['error']}"
    mfu = f", {row['mfu']:.1%} MFU" if row["mfu"] else ""
    return (
        f"  {row['size']} n={row['heads']} zero={row['zero']}: {row['tokens_per_s']:,.0f} tokens/s"
        f"{mfu}, {row['peak_gib']:.1f} GiB"
    )


def tables(results: dict[str, Found]) -> str:
    """Everything that was found, as Markdown."""
    machines = list(dict.fromkeys(found["machine"] for found in results.values() if found))
    parts = [*machines] if len(machines) == 1 else []

    def title(name: str) -> str:
        """With the commit, and with the machine where they are several."""
        machine = f"; {results[name]['machine']}" if len(machines) > 1 else ""
        head, *changes = results[name]["commit"].split(maxsplit=1)
        return f"*{name}* (commit {' '.join([head[:7], *changes])}{machine})"

    tests = results.get("tests", {})
    if "summary" in tests:
        parts.append(f"{title('tests')}\n\n`tests/gpu`: {tests['summary']}")
        parts += [f"- {failure}" for failure in tests.get("failures", ())]
    parts += [
        f"{title(name)}\n\n{results[name]['summary']}"
        for name in ("run", "loss", "training")
        if "summary" in results.get(name, {})
    ]
    for name, found in results.items():
        rows = list(found.get("rows", {}).values())
        if not rows:
            continue
        lines = [
            title(name),
            "",
            "| size | n | ZeRO | micro-batch | recomputation | backward | attention | compiled | V "
            "| chunk | documents | tokens/s | MFU | peak, GiB | by the plan |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        parts.append("\n".join(lines + [_row(row) for row in rows]))
        parts += [_kernel_table(row) for row in rows if "kernels" in row]
    return "\n\n".join(part for part in parts if part)


def _row(row: Found) -> str:
    cells = [row["size"], row["heads"], row["zero"], f"{row['micro']} x {row['sequence']}"]
    cells += [row["checkpointing"], row["backward"]]
    cells += [_chosen(row, "attention"), _chosen(row, "compiled"), row["vocabulary"]]
    cells += [row["chunk"] or "auto", "apart" if row["documents"] else "-"]
    if "error" in row:
        cells += [row["error"].replace("|", "/"), "", "", ""]
    else:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        cells += [f"{row['tokens_per_s']:,.0f}", mfu, f"{row['peak_gib']:.2f}", _planned(row)]
    return "| " + " | ".join(map(str, cells)) + " |"


def _chosen(row: Found, name: str) -> str:
    """A setting; and of `auto`, where it is known, what that was."""
    asked, used = row[name], row.get(f"{name}_used")
    words = {True: "yes", False: "no"}
    if asked == "auto" and used is not None:
        return f"auto: {words.get(used, used)}"
    return str(words.get(asked, asked))


def _planned(row: Found) -> str:
    """GiB that `pipeline.plan` says of the same run; on a GPU alone."""
    if row["mfu"] is None:
        return "-"
    known = {field.name: row[field.name] for field in fields(Point) if field.name in row}
    return f"{planned_gib(Point(**known)):.2f}"


def planned_gib(point: Point) -> float:
    """Peak memory of a point on a GPU, as `pipeline.plan` says."""
    config = RunConfig.model_validate(point.configuration("cuda"))
    (memory,) = run_memory(config, world_size=1, device="cuda", precision="bf16")
    return memory.total / 2**30


def _kernel_table(row: Found) -> str:
    what = f"{row['size']}, n = {row['heads']}"
    lines = [f"*Where a step's time goes, by kernel: {what}*", ""]
    lines += ["| kernel | ms | calls |", "|---|---|---|"]
    for kernel in row["kernels"][:15]:
        name = kernel["kernel"].replace("|", "/")
        for noise in ("void ", "at::native::", "(anonymous namespace)::"):
            name = name.replace(noise, "")
        name = name[:110]
        lines.append(f"| `{name}` | {kernel['ms']:.1f} | {kernel['calls']} |")
    return "\n".join(lines)
