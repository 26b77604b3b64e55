"""The tables of `benchmarks/gpu.sh`, from whatever has been measured."""

from typing import Any

from benchmarks.tables import machine_line

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


def tables(results: dict[str, Found], device: str) -> str:
    """Everything that was found, as Markdown."""
    parts = [machine_line(device)]
    tests = results.get("tests", {})
    if tests:
        parts.append(f"`tests/gpu`: {tests['summary']}")
        parts += [f"- {failure}" for failure in tests.get("failures", ())]
    for name in ("run", "loss", "training"):
        if "summary" in results.get(name, {}):
            parts.append(f"*{name}*\n\n{results[name]['summary']}")
    for name, found in results.items():
        rows = list(found.get("rows", {}).values())
        if not rows:
            continue
        lines = [
            f"*{name}*",
            "",
            "| size | n | ZeRO | micro-batch | recomputation | backward | attention | compiled | V "
            "| chunk | documents | tokens/s | MFU | peak, GiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(row) for row in rows]
        parts.append("\n".join(lines))
    kernels = [
        row["kernels"]
        for row in results.get("heads", {}).get("rows", {}).values()
        if "kernels" in row
    ]
    if kernels:
        lines = [
            "*Where a step's time goes, by kernel*",
            "",
            "| kernel | ms | calls |",
            "|---|---|---|",
        ]
        for kernel in kernels[0][:15]:
            name = kernel["kernel"].replace("|", "/")[:80]
            lines.append(f"| `{name}` | {kernel['ms']:.1f} | {kernel['calls']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(row: Found) -> str:
    cells = [row["size"], row["heads"], row["zero"], f"{row['micro']} x {row['sequence']}"]
    cells += [row["checkpointing"], row["backward"], row["attention"]]
    cells += ["yes" if row["compiled"] else "-", row["vocabulary"]]
    cells += [row["chunk"] or "auto", "apart" if row["documents"] else "-"]
    if "error" in row:
        cells += [row["error"].replace("|", "/"), "", ""]
    else:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        cells += [f"{row['tokens_per_s']:,.0f}", mfu, f"{row['peak_gib']:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _kernel_table(kernels: list[Found]) -> str:
    lines = ["*Where a step's time goes, by kernel*", ""]
    lines += ["| kernel | ms | calls |", "|---|---|---|"]
    for kernel in kernels[:15]:
        name = kernel["kernel"].replace("|", "/")[:80]
        lines.append(f"| `{name}` | {kernel['ms']:.1f} | {kernel['calls']} |")
    return "\n".join(lines)
