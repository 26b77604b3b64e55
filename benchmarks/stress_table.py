"""The counts of a whole `make stress`, from the report that pytest wrote.

    make stress ARGS=--junitxml=stress.xml
    python benchmarks/stress_table.py stress.xml [--note TEXT] [--write]

prints a line for each file of tests: how many passed, failed and were skipped, and how long they
took together. With --write it also goes to README.md beside this file.
"""

import argparse
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.tables import machine_line, replace_section

_OUTCOMES = ("failure", "error", "skipped")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="stress_table.py")
    parser.add_argument("report", type=Path, help="what pytest wrote with --junitxml")
    parser.add_argument("--commit", help="that was tested; by default the one checked out")
    parser.add_argument("--note", default="", help="a sentence about the machine's other work")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args(arguments)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = options.commit or subprocess.check_output(command, text=True).strip()
    section = table(options.report, commit, options.note)
    print(section)
    if options.write:
        replace_section(Path(__file__).parent / "README.md", "stress", section)
    return 0


def table(report: Path, commit: str, note: str) -> str:
    """The whole section, as Markdown.

    Args:
        report: the XML file.
        commit: that was tested.
        note: a sentence to end the first paragraph with.
    """
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    for case in suite.iter("testcase"):
        place = case.get("classname", "").replace(".", "/") + ".py"
        outcome = next((name for name in _OUTCOMES if case.find(name) is not None), "passed")
        counts[place][outcome] += 1
        seconds[place] += round(float(case.get("time", "0")))
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    minutes = float(suite.get("time", "0")) / 60
    lines = [
        machine_line(),
        f"Commit {commit}; {minutes:.0f} minutes. {note}".rstrip(),
        "",
        "| tests | passed | failed | skipped | minutes of its worker |",
        "|---|---|---|---|---|",
    ]
    for place in sorted(counts):
        lines.append(_row(f"`{place}`", counts[place], seconds[place]))
    lines.append(_row("**all**", total, sum(seconds.values())))
    return "\n".join(lines)


def _row(name: str, counts: Counter[str], seconds: int) -> str:
    failed = counts["failure"] + counts["error"]
    return f"| {name} | {counts['passed']} | {failed} | {counts['skipped']} | {seconds / 60:.1f} |"


if __name__ == "__main__":
    sys.exit(main())
