"""The whole pipeline once, by the commands a person would type: `make quickstart`.

Shards of Python's own standard library, pretraining that is killed and resumed, held-out loss,
export, generation, report. Every command is printed before it runs; the first that fails ends it.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from model.errors import ConfigError
from pipeline.checkpoint.file_names import FOLDER, LATEST
from pipeline.config.run_config import RunConfig, load_config
from pipeline.report import REPORT_NAME
from pipeline.reporting.metrics import METRICS_NAME, Scalars, read_metrics

EPILOG = """\
examples:
  PROG
  PROG --set train.steps=200

exit status: 0 everything worked, 1 a command failed or the loss did not fall, 2 wrong arguments or
configuration, 130 after Ctrl-C
"""
CONFIG = Path("configs/quickstart.yaml")
CPU_RANKS = 2
KILL_AFTER = 0.55  # of the steps; between two checkpoints, so that some steps are lost
REQUIRED_FALL = 0.35
COMPARED_STEP = 10
PROMPTS = ("def __init__(self, ", "import os")
NEW_TOKENS = 96
_POLL_S = 0.1
_SHOW_CURSOR = "\x1b[?25h"


class QuickstartError(Exception):
    """A part did not do what it should; says which, and what to look at."""


class HeldOutLoss(NamedTuple):
    """Validation loss of one head, early and at the end of the run."""

    head: int
    early: float
    final: float

    @property
    def fall(self) -> float:
        """The part of the early loss that is gone."""
        return 1 - self.final / self.early


class Parts:
    """Prints and times the parts of the quickstart and runs their commands.

    Args:
        total: how many parts there are.
        environment: variables of the commands, beside those of this process.
    """

    def __init__(self, total: int, environment: Mapping[str, str]) -> None:
        self._total = total
        self._environment = {**os.environ, **environment}
        self._titles: list[str] = []
        self._start_s = self._part_start_s = time.monotonic()

    def begin(self, title: str) -> None:
        """Announce the next part."""
        self._end()
        self._titles.append(title)
        self._part_start_s = time.monotonic()
        _say(f"\n== [{len(self._titles)}/{self._total}] {title}")

    def run(self, *command: str) -> None:
        """Run a command to its end.

        Raises:
            QuickstartError: it did not end with status 0.
        """
        status = self.start(*command).wait()
        if status:
            raise QuickstartError(
                f"{self._titles[-1]}: the command ended with status {status}; its own message "
                "is above"
            )

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Print a command and start it."""
        _say(f"$ {shlex.join(command)}")
        return subprocess.Popen(command, env=self._environment)

    def finish(self) -> float:
        """End the last part; seconds since the beginning."""
        self._end()
        return time.monotonic() - self._start_s

    def _end(self) -> None:
        if self._titles:
            _say(f"   done in {time.monotonic() - self._part_start_s:.0f} s")


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.quickstart"
) -> int:
    """Run the quickstart; give its exit status."""
    options = _parse(arguments, prog)
    if not CONFIG.is_file():
        _say(f"error: {CONFIG} is not here; run `make quickstart` in the checkout")
        return 2
    try:
        _quickstart(load_config(CONFIG, options.set), options.set)
    except (QuickstartError, ConfigError) as error:
        sys.stdout.flush()
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `make quickstart` starts over", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"values that win over {CONFIG}, e.g. train.steps=100",
    )
    return parser.parse_args(arguments)


def _quickstart(config: RunConfig, overrides: Sequence[str]) -> None:
    import torch  # late, so that --help and mistakes do not wait for it

    num_gpus = torch.cuda.device_count()
    ranks = num_gpus or CPU_RANKS
    cores = len(os.sched_getaffinity(0))
    _say(
        f"{num_gpus} GPUs, {cores} cores: {ranks} processes. All commands run in {Path.cwd()}; "
        "they can be typed as they stand."
    )
    environment = {"OMP_NUM_THREADS": str(max(cores // ranks, 1)), "PYTHONUNBUFFERED": "1"}
    parts = Parts(7, environment)
    run_dir, python = config.run.dir, _shown_python()
    export_dir = run_dir / "export"

    parts.begin("Shards of the Python standard library, with a tokenizer trained on it")
    parts.run(python, *_shard_arguments(config))
    train = [python, "-m", "torch.distributed.run", "--standalone"]
    train += ["--nproc-per-node", str(ranks), "-m", "pipeline.train", str(CONFIG)]
    settings = ["--set", *overrides] if overrides else []

    parts.begin(f"Pretraining of {config.model.future_tokens} heads; to be killed part way")
    killed_step = kill_part_way(parts, (*train, "--resume", "none", *settings), config)
    parts.begin(f"Resuming the run that was killed after step {killed_step}")
    parts.run(*train, "--resume", "auto", *settings)

    parts.begin("Held-out loss")
    losses = held_out_losses(read_metrics(run_dir))
    _say(describe_losses(losses, config.last_step))
    check_fall(losses)

    parts.begin("Export to the Hugging Face format")
    parts.run(python, "-m", "pipeline.export", str(run_dir), str(export_dir))
    parts.begin("Generation: head 1 alone, then all heads (the outputs must be equal)")
    generation = (python, "-m", "model.generate", str(export_dir), "--compare")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    parts.run(*generation, "--max-new-tokens", str(NEW_TOKENS), *prompts)

    parts.begin("Report")
    parts.run(python, "-m", "pipeline.report", str(run_dir))
    seconds = parts.finish()
    _say(f"\nquickstart: everything worked, in {seconds // 60:.0f} min {seconds % 60:02.0f} s")
    _say(f"  model   {export_dir}\n  report  {run_dir / REPORT_NAME}")


def _shown_python() -> str:
    """This interpreter, as a path from here where it lies below."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _shard_arguments(config: RunConfig) -> list[str]:
    """The standard library of this Python: source files, without installed packages."""
    library = sysconfig.get_path("stdlib")
    command = ["data_prep/shard.py", "--input", library, "--output", str(config.data.shards)]
    command += ["--tokenizer", f"train:{config.model.vocab_size}", "--glob", "*.py"]
    return [*command, "--exclude", "site-packages", "dist-packages"]


def kill_part_way(parts: Parts, command: Sequence[str], config: RunConfig) -> int:
    """Start a training run and end it with SIGKILL, as a power cut would, after a checkpoint.

    Returns:
        The last step the run had reported.

    Raises:
        QuickstartError: the run ended before it could be killed.
    """
    started_s = time.time()
    run_dir, kill_step = config.run.dir, int(config.last_step * KILL_AFTER)
    process = parts.start(*command)
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            step = _reported_step(run_dir, started_s)
            if step >= kill_step and _is_newer(run_dir / FOLDER / LATEST, started_s):
                kill_tree(process.pid)
                _say(f"\n   killed with SIGKILL after step {step}")
                return step
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()
        if sys.stdout.isatty():  # a killed progress line leaves it hidden
            print(_SHOW_CURSOR, end="", flush=True)
    raise QuickstartError(
        f"training ended with status {process.returncode} before it could be killed at step "
        f"{kill_step}; its own message is above"
    )


def _reported_step(run_dir: Path, since_s: float) -> int:
    """The last step in the metrics of the run that began at `since_s`; 0 before there is one."""
    if not _is_newer(run_dir / METRICS_NAME, since_s):
        return 0
    records = read_metrics(run_dir)
    return int(records[-1]["step"] or 0) if records else 0


def _is_newer(path: Path, since_s: float) -> bool:
    """Whether a file was written after a moment; files of an earlier run were not."""
    try:
        return path.stat().st_mtime >= since_s
    except FileNotFoundError:
        return False


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all that it started: launcher, ranks, their workers.

    A signal to the launcher's group would miss the ranks, which have groups of their own.
    """
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes[1:], timeout=30)


def held_out_losses(records: Sequence[Scalars]) -> list[HeldOutLoss]:
    """Validation loss of each head at step 10 and at the last validation.

    Raises:
        QuickstartError: the metrics hold no validation at step 10 and after it.
    """
    evaluated = [record for record in records if record.get("eval_loss_head_1") is not None]
    early = next((record for record in evaluated if record["step"] == COMPARED_STEP), None)
    if early is None or evaluated[-1] is early:
        raise QuickstartError(
            f"the metrics have no validation at step {COMPARED_STEP} and after it; set "
            f"eval.every_steps to {COMPARED_STEP} and train.steps to more"
        )
    final = evaluated[-1]
    losses: list[HeldOutLoss] = []
    while (value := final.get(key := f"eval_loss_head_{len(losses) + 1}")) is not None:
        losses.append(HeldOutLoss(len(losses) + 1, float(early[key] or 0.0), float(value)))
    return losses


def describe_losses(losses: Sequence[HeldOutLoss], last_step: int) -> str:
    """A table, a line for each head."""
    lines = [f"   nats per token    step {COMPARED_STEP:<4} step {last_step:<6} change"]
    lines += [
        f"   head {loss.head} (t+{loss.head})     {loss.early:9.4f} {loss.final:11.4f} "
        f"{-loss.fall:9.1%}"
        for loss in losses
    ]
    return "\n".join(lines)


def check_fall(losses: Sequence[HeldOutLoss]) -> None:
    """Hold the fall of the next-token loss against the bar.

    Raises:
        QuickstartError: it fell by less.
    """
    if losses[0].fall < REQUIRED_FALL:
        raise QuickstartError(
            f"the held-out loss of head 1 fell by {losses[0].fall:.1%}, less than "
            f"{REQUIRED_FALL:.0%}; look at the curves in metrics.jsonl, or give train.steps more"
        )


def _say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
