"""The job scripts, run by bash with stand-ins for Slurm's commands that note their calls."""

import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED = "started"

# Writes down how it was called, runs as the test says; USR1 ends it with the trainer's status 75.
FAKE_SRUN = """#!/bin/bash
case "$*" in *--notify*) exit ;; esac
printf '%s\\n' "$@" > "$RECORD/srun_arguments"
env > "$RECORD/srun_environment"
trap 'echo USR1 >> "$RECORD/signals"; sleep 0.3; exit "${STATUS_ON_USR1:-75}"' USR1
touch "$RECORD/started"
for _ in $(seq "${STEP_TICKS:-0}"); do sleep 0.05; done
exit "${STEP_STATUS:-0}"
"""
# Says who it is; else srun under another name. TERM ends it with a status of its own.
FAKE_MPIRUN = """#!/bin/bash
[ "$1" != --version ] || { echo "${FAKE_MPI:-HYDRA build details: 5.0.2}"; exit 0; }
printf '%s\\n' "$@" > "$RECORD/mpirun_arguments"
trap 'echo TERM >> "$RECORD/signals"; exit 9' TERM
touch "$RECORD/started"
for _ in $(seq "${STEP_TICKS:-0}"); do sleep 0.05; done
exit "${STEP_STATUS:-0}"
"""
FAKE_SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf '%s\\n' alpha7 alpha8 beta1 ;;
  "show job") printf '   %s\\n' "StdOut=$RECORD/output" Restarts=0 \\
    "JobState=${FAKE_STATE:-RUNNING}" \\
    "TimeLimit=${FAKE_LIMIT:-01:00:00}" "Command=${FAKE_COMMAND:-(null)}" ;;
  requeue*) echo "$2" > "$RECORD/requeued"; kill -KILL "$PPID" ;; # Slurm ends the script
esac
"""
# Counts GPUs, and checks a run before it starts; the step itself is srun's.
FAKE_PYTHON = """#!/bin/bash
[ "$1" != -c ] || echo "${FAKE_GPUS:-0}"
case "$*" in
  *--check*)
    printf '%s\\n' "$@" > "$RECORD/check_arguments"
    [ -n "${CHECK_STATUS:-}" ] || { echo "$RECORD/run"; exit 0; }
    echo "error: train.steps must be a number" >&2
    exit "$CHECK_STATUS" ;;
  *--notify*) printf '%s\\n' "${@: -2}" >> "$RECORD/told" ;;
esac
"""


class Job:
    """One job script with its stand-ins, in a folder of its own.

    Args:
        folder: an empty folder.
        script: name of the job script.
    """

    def __init__(self, folder: Path, script: str) -> None:
        self.record = folder / "record"
        self.record.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        fakes = {
            "srun": FAKE_SRUN,
            "mpirun": FAKE_MPIRUN,
            "scontrol": FAKE_SCONTROL,
            "fake-python": FAKE_PYTHON,
        }
        for name, text in fakes.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        # sbatch runs a copy of the script, from another folder.
        self.script = folder / "slurm_script"
        self.script.write_bytes((ROOT / "slurm" / script).read_bytes())
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "PYTHON": "fake-python",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_NODELIST": "alpha[7-8],beta1",
            "SLURM_CPUS_ON_NODE": "96",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script with more environment."""
        return subprocess.Popen(
            ["bash", str(self.script), *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run the script to its end; exit status and output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def signal_step(self, number: signal.Signals, **environment: str) -> tuple[int, str]:
        """Start the script, signal it while the step runs; exit status and output."""
        process = self.start(STEP_TICKS="400", **environment)
        deadline_s = time.monotonic() + 30
        while not (self.record / STARTED).exists():
            assert time.monotonic() < deadline_s, "the step did not start"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def srun_arguments(self) -> list[str]:
        """What srun was called with."""
        return (self.record / "srun_arguments").read_text().splitlines()

    def told(self) -> list[str]:
        """Outcome and reason of each call of run.notify."""
        path = self.record / "told"
        return path.read_text().splitlines() if path.exists() else []

    def mpirun_arguments(self) -> list[str]:
        """What mpirun was called with."""
        return (self.record / "mpirun_arguments").read_text().splitlines()

    def srun_environment(self) -> dict[str, str]:
        """The variables that reach the tasks."""
        lines = (self.record / "srun_environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)
