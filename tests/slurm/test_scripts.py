"""What all job scripts have, and the one that exports."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.stand_ins import ROOT, Job

JOB_SCRIPTS = ("pretrain_7b.sh", "shard_corpus.sh", "export.sh")


def _directives(script: str) -> list[str]:
    text = (ROOT / "slurm" / script).read_text()
    return re.findall(r"^#SBATCH +(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(path: Path) -> None:
    """A typo is found before a job waits in a queue for it."""
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_nothing_of_one_cluster_is_in_the_directives(script: str) -> None:
    """Partition, account and the like come from the command line, as does the time limit."""
    names = {directive.split("=")[0].split()[0] for directive in _directives(script)}
    site = {"partition", "account", "qos", "constraint", "reservation", "time", "gres"}
    assert names & {f"--{name}" for name in site} == set()
    assert names & {"-p", "-A", "-q", "-C", "-t"} == set()
    assert {"--nodes", "--requeue"} <= names
    assert "--open-mode=append" in _directives(script)
    if script != "export.sh":  # which has nothing to save
        assert any(directive.startswith("--signal=B:USR1@") for directive in _directives(script))


def test_export_runs_the_export_command(tmp_path: Path) -> None:
    """One task, with the script's arguments; without them it says how it is called."""
    export = Job(tmp_path, "export.sh")
    export.environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "8"}
    status, output = export.run("runs/7b", "out", "--dtype", "bf16")
    assert status == 0, output
    arguments = export.srun_arguments()
    assert arguments[:3] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=8"]
    assert arguments[3:] == [
        *["fake-python", "-m", "pipeline.export", "runs/7b", "out", "--dtype", "bf16"]
    ]
    status, output = export.run("runs/7b")
    assert (status, "give a run or checkpoint and a folder" in output) == (2, True)
