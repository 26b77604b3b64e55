"""A trainer that needs no torch: what the job scripts see of the real one, and started at once.

Called as the interpreter (`PYTHON=...`). Under srun every rank takes a step each 0.1 s, rank 0
writes the steps down and "saves" each tenth one; TERM and USR1 save and end it with 75. The real
trainer runs under the same scripts in `test_training.py`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.launching.verdict import Verdict

STEP_S = 0.1
TOLD = "told"  # a file in the run's folder: outcome and reason of each call of run.notify
LOST = "lost"  # a file in the run's folder that names a node: rank 0 blames it, as a watchdog does


def main(arguments: list[str]) -> int:
    """What `python ARGUMENTS` does."""
    if arguments[0] == "-c":
        print(0)  # GPUs
        return 0
    options = json.loads(Path(arguments[2]).read_text(encoding="utf-8"))
    run_dir = Path(options["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    if "--notify" in arguments:
        with (run_dir / TOLD).open("a", encoding="utf-8") as file:
            file.write(" ".join(arguments[-2:]) + "\n")
        return 0
    if "--check" in arguments:
        if problem := options.get("problem"):
            print(f"error: {problem}", file=sys.stderr)
            return 2
        print(run_dir)
        return 0
    return _train(options, run_dir, int(os.environ["SLURM_PROCID"]))


def _train(options: dict[str, object], run_dir: Path, rank: int) -> int:
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: stopped.append(number))
    latest = run_dir / "checkpoints" / "latest"
    step = int(latest.read_text().split("_")[1]) if latest.exists() else 0
    if rank == 0:
        print(f"start at step {step} on {os.environ['SLURM_STEP_NODELIST']}", flush=True)
    while step < int(str(options["steps"])) and not stopped:
        time.sleep(STEP_S)
        step += 1
        if options.get("failing_rank") == rank and step == 5:
            message = f"rank {rank}: ValueError: a bug"
            print(f"error: {message}", file=sys.stderr, flush=True)
            Verdict(run_dir, os.environ, rank).record("failed", message, exit_code=1)
            return 1
        if rank == 0 and (run_dir / LOST).exists():
            host = (run_dir / LOST).read_text()
            message = f"rank 0: stopping, because rank 2 has not answered (process 7 on {host})"
            print(f"error: {message}", file=sys.stderr, flush=True)
            (run_dir / LOST).unlink()
            Verdict(run_dir, os.environ, rank).record("lost", message, exit_code=1, host=host)
            return 1
        if rank == 0:
            with (run_dir / "steps").open("a", encoding="utf-8") as file:
                file.write(f"{step}\n")
            if options.get("saves", True) and (step % 10 == 0 or stopped):
                latest.parent.mkdir(exist_ok=True)
                latest.write_text(f"step_{step:08d}\n")
    return 75 if stopped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
