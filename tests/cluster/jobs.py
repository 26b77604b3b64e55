"""Jobs of the test cluster: submitted as users do, looked at, and waited for."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.testbed import Cluster

ROOT = Path(__file__).parents[2]
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """A job script that was submitted.

    Args:
        cluster: where to.
        folder: of the job's output.
        script: path of the script.
        options: of sbatch.
        arguments: of the script.
        variables: environment of sbatch.

    Attributes:
        number: Slurm's number of it.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        script: str | Path,
        *,
        options: Sequence[str] = (),
        arguments: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self._cluster = cluster
        self._output = folder / "output_%j.txt"
        command = ["sbatch", "--parsable", f"--output={self._output}", f"--chdir={ROOT}"]
        submitted = cluster.run(
            *command, *options, str(ROOT / script), *arguments, environment=variables
        )
        self.number = submitted.strip()

    @property
    def log(self) -> str:
        """What the job has written so far."""
        path = Path(str(self._output).replace("%j", self.number))
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def last_line(self) -> str:
        """The log's last line."""
        return self.log.splitlines()[-1]

    def field(self, name: str) -> str:
        """A field of what Slurm says of the job."""
        shown = self._cluster.run("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found[1]

    @property
    def state(self) -> str:
        """Slurm's word for its state."""
        return self.field("JobState")

    def wait_for(self, words: str, timeout_s: float = 60) -> None:
        """Wait until the log has some words."""
        self._cluster.wait(lambda: words in self.log, f"{words!r} in the log:", timeout_s)

    def wait_for_starts(self, count: int, timeout_s: float = 60) -> None:
        """Wait until the training has begun that often."""
        self._cluster.wait(
            lambda: len(self.starts) >= count, f"{count} starts in the log", timeout_s
        )

    @property
    def starts(self) -> list[str]:
        """Nodes of each start of the stand-in's training."""
        return re.findall(r"^start at step \d+ on (.*)$", self.log, re.MULTILINE)

    def finish(self, timeout_s: float = 90) -> str:
        """Wait for its end; Slurm's word for it."""
        try:
            self._cluster.wait(lambda: self.state in _ENDED, "the job has ended", timeout_s, 0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}\n== the job's output\n{self.log}") from None
        return self.state

    def signal(self, name: str) -> None:
        """Send the batch script a signal, as Slurm does before the time limit."""
        self._cluster.run("scancel", "--batch", f"--signal={name}", self.number)


def submit_training(
    cluster: Cluster, folder: Path, config: Path, options: Sequence[str], *settings: str
) -> Job:
    """Submit a run of the real trainer.

    Args:
        cluster: where to.
        folder: of the job's output.
        config: of the run.
        options: of sbatch.
        settings: of `--set`.
    """
    return Job(
        cluster,
        folder,
        "slurm/pretrain_7b.sh",
        options=options,
        arguments=[str(config), "--set", *settings],
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
    )


def interpreter(folder: Path) -> str:
    """An interpreter for job scripts that is `tests/cluster/trainer.py`."""
    path = folder / "python"
    trainer = "tests.cluster.trainer"
    path.write_text(
        f'#!/bin/bash\nPYTHONPATH={ROOT} PYTHONSAFEPATH=1 exec {sys.executable} -m {trainer} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def light_run(folder: Path, **options: object) -> Path:
    """A configuration of the stand-in; its folder is `folder / "run"`."""
    path = folder / "run.json"
    path.write_text(json.dumps({"run_dir": str(folder / "run"), "steps": 30} | options))
    return path


def trained_steps(folder: Path) -> list[int]:
    """The steps that the stand-in took, over all starts."""
    path = folder / "run" / "steps"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
