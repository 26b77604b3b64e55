"""Study: two-token losses count mutual information twice, and choices (n+1)/2 times more.

`python -m benchmarks.studies.choice_points` checks both on random tables, to rounding, and writes
the table of its README.md; it takes a second, with --quick less.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.studies.choice_points.tables import (
    entropy,
    first,
    identity_gap,
    inconsequential_terms,
    random_table,
    relative_gap,
    relative_mutual_information,
    second,
    terms_at,
)
from benchmarks.tables import machine_line, replace_section

_SIZES = ((2, 2), (3, 5), (8, 8), (20, 30))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tables; writes no results")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where README.md lies")
    options = parser.parse_args(arguments)
    text = report(20 if options.quick else 1_000)
    print(text)
    output = options.output or (None if options.quick else Path(__file__).parent)
    if output is not None:
        replace_section(output / "README.md", "study", f"{machine_line()}\n\n{text}")
    return 0


def report(tables: int) -> str:
    """Both findings, as Markdown."""
    rows = [
        f"| H(X) + H(Y) = H(X\\|Y) + 2 I + H(Y\\|X), and its relative form, {tables} tables each | "
        "largest gap | H(X) + H(Y), mean | I counted twice, mean |",
        "|---|---|---|---|",
    ]
    for size in _SIZES:
        generator, gap, total, twice = Random(sum(size)), 0.0, 0.0, 0.0
        for _ in range(tables):
            p, q = random_table(generator, *size), random_table(generator, *size)
            gap = max(gap, abs(identity_gap(p)), abs(relative_gap(p, q)))
            total += entropy(first(p)) + entropy(second(p))
            twice += 2 * relative_mutual_information(p, p)
        rows.append(
            f"| {size[0]} x {size[1]} | {gap:.1e} | {total / tables:.3f} | {twice / tables:.3f} |"
        )
    rows += [
        "",
        "| n | terms at a choice point | terms of another token | ratio |",
        "|---|---|---|---|",
    ]
    for heads in range(1, 9):
        at, other = terms_at(20, 40, heads), inconsequential_terms(heads)
        rows.append(f"| {heads} | {at} | {other} | {at / other:g} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
