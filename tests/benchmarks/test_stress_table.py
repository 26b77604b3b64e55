"""The table of a long run of tests, from pytest's own report."""

from pathlib import Path

from benchmarks.stress_table import table

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="0" failures="1" skipped="1" tests="3" time="121.0">
<testcase classname="tests.a.test_x" name="one" time="60.2"/>
<testcase classname="tests.a.test_x" name="two" time="0.9"><failure message="no"/></testcase>
<testcase classname="tests.b.test_y" name="three" time="30.0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>
"""


def test_outcomes_are_counted_by_file(tmp_path: Path) -> None:
    """And added up."""
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    lines = table(report, "abc1234", "Nothing else ran.").splitlines()
    assert lines[1] == "Commit abc1234; 2 minutes. Nothing else ran."
    assert lines[-3:] == [
        "| `tests/a/test_x.py` | 1 | 1 | 0 | 1.0 |",
        "| `tests/b/test_y.py` | 0 | 0 | 1 | 0.5 |",
        "| **all** | 1 | 1 | 1 | 1.5 |",
    ]
