"""The command line of sbatch: limits that are read as Slurm reads them, mistakes found before."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.launching.sbatch import JobRequest, lint, seconds_of, signal_problem
from pipeline.launching.snapshot import job_script


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_time_limits_are_read_as_slurm_does(limit: str, seconds: int | None) -> None:
    """One number is minutes, two are minutes and seconds; behind a dash the first is hours."""
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        (["--time=5"], True),  # the script's own --signal is 300 s before
        (["-t", "5"], True),
        (["-t5"], True),
        (["--time", "5:01"], False),
        (["--time=5", "--signal=B:USR1@60"], False),
        (["--time=1", "--signal=B:USR1"], True),
        (["--time=1-0", "--time=4"], True),
        ([], False),
        (["--time=UNLIMITED"], False),
    ],
)
def test_a_warning_that_comes_at_once_is_refused(options: list[str], is_refused: bool) -> None:
    """Of several values the last counts, as with sbatch."""
    problem = signal_problem(options, job_script())
    assert (problem is not None) == is_refused
    if problem is not None:
        assert "is not above" in problem


def test_a_machine_without_slurm_is_told_apart(tmp_path: Path) -> None:
    """The message says where to submit, and what goes without."""
    request = JobRequest(job_script(), tmp_path / "c.yaml", ("--nodes=1",), {"A": "b c"})
    assert request.shown() == f"A='b c' sbatch --nodes=1 {job_script()} {tmp_path}/c.yaml"
    with pytest.raises(ConfigError, match=r"submit on a login node"):
        lint(request, {"PATH": str(tmp_path)})
