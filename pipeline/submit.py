"""Command line: a run as a Slurm job, `python -m pipeline.submit CONFIG -- SBATCH OPTIONS`.

Configuration, shards and number of ranks are checked before the job waits in a queue; code and
configuration are copied into the run's folder, and every start of the job, also one that is queued
again, runs that copy.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import DataError
from foundation.command_line import exit_status
from model.errors import CheckpointError, ConfigError
from pipeline.config.run_config import RunConfig, load_config
from pipeline.launching.sbatch import JobRequest, lint, signal_problem, submit
from pipeline.launching.snapshot import SUBMISSIONS, job_script, take_snapshot

EPILOG = """\
examples:
  PROG configs/7b.yaml --nodes 8 --gpus-per-node 8 -- --time=24:00:00 --partition=gpu
  PROG configs/7b.yaml --nodes 8 --set batch.accumulation=1 --print

What follows -- are options of sbatch; they win over those of slurm/pretrain_7b.sh. Variables of
that script (SRUN_ARGS, CONTAINER_IMAGE, ...) are taken from the environment.

exit status: 0 the job is in the queue, 2 it was refused (in one line)
"""
EXIT_REFUSED = 2


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.submit") -> int:
    """Run the command; give its exit status."""
    options = _parse(arguments, prog)

    def submit() -> None:
        config = load_config(options.config, options.set)
        _check(config, options)
        _submit(config, options)

    return exit_status(submit, ConfigError, DataError, CheckpointError, failed=EXIT_REFUSED)


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check a run, copy its code and configuration into its folder, and submit it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("config", type=Path, help="the run's YAML file")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the file",
    )
    add("--nodes", type=_count, metavar="N", help="nodes of the job (those of the job script)")
    add(
        "--gpus-per-node",
        type=_count,
        metavar="N",
        help="GPUs to ask for on each node; as many ranks start there",
    )
    add(
        "--ranks-per-node",
        type=_count,
        metavar="N",
        help="processes on each node (a process per GPU)",
    )
    add("--print", action="store_true", help="show what would be submitted, and do nothing")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # argparse would look for the words behind -- where the options end, before --set.
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:end])
    options.sbatch = given[end + 1 :]
    return options


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _check(config: RunConfig, options: argparse.Namespace) -> None:
    """Refuse what the job would be refused for, as far as it is known here."""
    if problem := signal_problem(options.sbatch, job_script()):
        raise ConfigError(problem)
    if added := os.environ.get("ARGS", "").strip():
        raise ConfigError(
            f"ARGS={added} is set: the job script would add it to a run that was checked without "
            "it; unset ARGS, and give settings with --set"
        )
    # Imported late: it takes seconds, and mistakes in the file need not wait for them.
    from pipeline.launching.checks import check_run

    ranks = options.ranks_per_node or options.gpus_per_node
    world_size = options.nodes * ranks if options.nodes and ranks else None
    check_run(config, world_size, resume="auto")


def _submit(config: RunConfig, options: argparse.Namespace) -> None:
    if options.print:
        folder = config.run.dir.absolute() / SUBMISSIONS / "NUMBER"
        script = folder / "code" / "slurm" / job_script().name
        request = _request(config, options, script, folder / "config.yaml")
        print(request.shown())
        return
    probe = _request(config, options, job_script(), options.config)
    print(lint(probe, os.environ))
    snapshot = take_snapshot(config)
    request = _request(config, options, snapshot.script, snapshot.config)
    number = submit(request, os.environ)
    print(f"job {number} submitted: {request.shown()}")
    print(f"runs          {snapshot.folder}, whatever becomes of {options.config} and the code")
    print(f"job's output  {_output(config).replace('%j', number)}")
    print(f"ranks' logs   {config.run.dir / 'logs'}")
    print(f"stop it       scancel {number}")


def _request(
    config: RunConfig, options: argparse.Namespace, script: Path, path: Path
) -> JobRequest:
    """What to ask sbatch for."""
    chosen = [
        f"--job-name={config.run.name}",
        f"--chdir={Path.cwd()}",
        f"--output={_output(config)}",
    ]
    if options.nodes:
        chosen.append(f"--nodes={options.nodes}")
    if options.gpus_per_node:
        chosen.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.ranks_per_node:
        chosen.append(f"--ntasks-per-node={options.ranks_per_node}")
    return JobRequest(script, path, (*chosen, *options.sbatch), {})


def _output(config: RunConfig) -> str:
    """Where Slurm writes the job's output, %j standing for its number."""
    return str(config.run.dir.absolute() / "slurm-%j.out")


if __name__ == "__main__":
    sys.exit(main())
