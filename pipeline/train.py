"""Pretrain a model: torchrun ... -m pipeline.train CONFIG, or srun python -m pipeline.train CONFIG.

Exit codes: 0 the run reached its last step; 75 a signal stopped it and it was saved; 2 the
configuration, data or checkpoint cannot be used; 1 anything else.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from data_prep.errors import DataError
from foundation.shown_text import printable, told
from model.errors import CheckpointError, ConfigError, TrainingError
from pipeline.config.run_config import (
    Device,
    Precision,
    RunConfig,
    data_parallel_size,
    load_config,
    resolve_device,
    resolve_precision,
)
from pipeline.distributed.cuda_settings import prepare_cuda
from pipeline.distributed.launch import Launch
from pipeline.distributed.rendezvous import RankInfo, rank_info
from pipeline.launching.notification import Ending, notify, notify_as_rank
from pipeline.launching.verdict import OUTCOMES, blamed_host
from pipeline.reporting.metrics import read_metrics
from pipeline.reporting.run_log import quieten_libraries

if TYPE_CHECKING:
    from pipeline.job import Job

EPILOG = """\
examples:
  PROG configs/quickstart.yaml
  torchrun --nproc-per-node 8 -m pipeline.train configs/1b.yaml --set data.shards=data/corpus
  srun python -m pipeline.train configs/7b.yaml
  PROG configs/7b.yaml --dry-run --world-size 64

exit status: 0 the run reached its last step, 75 a signal stopped it and it was saved (the same
command goes on), 2 the configuration, data or checkpoint cannot be used (in one line), 1 anything
else
"""
EXIT_FAILED, EXIT_USER_FAULT = 1, 2
_MOST_RANKS = 1 << 20
_RANK_0_SPEAKS_S = 5.0


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.train") -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments, prog)
    quieten_libraries()
    launch: Launch | None = None
    config: RunConfig | None = None
    try:
        info = rank_info(os.environ)
        launch = Launch(info, os.environ, orphaned=lambda reason: _end_orphan(info, reason))
        config = load_config(options.config, options.set)
        if options.dry_run:
            _print_dry_run(config, _assumed_ranks(options.world_size, info))
            return 0
        if options.check:
            _check(config, options, info)
            return 0
        if options.notify:
            _notify(config, *options.notify)
            return 0
        data_parallel_size(config, info.world_size)
        prepare_cuda(
            os.environ, stages=len(config.stage_plan), deterministic=config.train.deterministic
        )
        device, precision = _resolve(config)
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        message = told(error) if isinstance(error, OSError) else str(error)
        _refuse(message, launch)
        if config is not None and info.rank == 0 and not (options.dry_run or options.check):
            notify_as_rank(config.run, Ending("refused", message, None), os.environ)
        return EXIT_USER_FAULT
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there are GPUs that this run leaves alone
    # Imported late: DeepSpeed and megatron-core take seconds, and what is above needs neither.
    from pipeline.job import Job

    return _run(Job(config, options.resume, info, device, precision, launch), info)


def _refuse(message: str, launch: Launch | None) -> None:
    """Say why this rank cannot start; what all ranks would say, rank 0 says alone.

    They read the same file. But when rank 0 goes on, the fault is this node's.
    """
    if launch is None or launch.info.rank == 0:
        _say(f"error: {message}")
        return
    deadline_s = time.monotonic() + _RANK_0_SPEAKS_S
    while time.monotonic() < deadline_s:
        if launch.ended() is not None or launch.is_not_here(0):
            return
        time.sleep(0.2)
    _say(f"error: rank {launch.info.rank}/{launch.info.world_size}: {message}")


def _end_orphan(info: RankInfo, reason: str) -> NoReturn:
    """End a rank that nobody would stop any more, from whatever it is in."""
    _say(
        f"error: rank {info.rank}/{info.world_size}: stopping, because {reason}, and nothing "
        "would end this rank: start the job again, and it goes on from its last checkpoint"
    )
    os._exit(EXIT_FAILED)


def _run(job: "Job", info: RankInfo) -> int:
    """Run the job; errors become one line that names the rank, and an exit code."""
    from pipeline.distributed.agreement import AgreedByAllRanks
    from pipeline.distributed.meeting import MissingRankError
    from pipeline.distributed.signals import EXIT_STOPPED

    try:
        stopped_by = job.run()
    except (ConfigError, DataError, CheckpointError, TrainingError) as error:
        if info.rank != 0 and isinstance(error.__cause__, AgreedByAllRanks):
            # Rank 0 says it, and is killed with all others as soon as this one ends.
            job.verdict.wait(_RANK_0_SPEAKS_S)
            return EXIT_USER_FAULT
        message = str(error) if info.rank == 0 else f"{job.position}: {error}"
        _say(f"error: {message}")
        is_lost = isinstance(error, MissingRankError)
        host = blamed_host(message) if is_lost else None
        job.record("lost" if is_lost else "refused", message, exit_code=EXIT_USER_FAULT, host=host)
        return EXIT_USER_FAULT
    except Exception as error:
        job.log_traceback()
        message, outcome, host = job.explain(error)
        _say(f"error: {job.position}: {message}")
        job.record(outcome, f"{job.position}: {message}", exit_code=EXIT_FAILED, host=host)
        return EXIT_FAILED
    return 0 if stopped_by is None else EXIT_STOPPED


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pretrain a model, or go on with a run; one process is one rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the file, e.g. --set train.steps=100 batch.micro_size=4",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|none",
        help="auto (default): from the newest whole checkpoint in run.dir, if there is one; PATH: "
        "from that checkpoint; none: start new, earlier files move to run.dir/previous_N",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved run without starting it"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check configuration, shards, number of ranks and run.dir without starting the run; "
        "prints run.dir",
    )
    parser.add_argument(
        "--notify",
        nargs=2,
        metavar=("OUTCOME", "REASON"),
        help="call run.notify as if the run had ended so, and do nothing else; job scripts do, and "
        f"it is a way to try the command; OUTCOME: {', '.join(OUTCOMES)}",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks that --dry-run and --check assume"
    )
    return parser.parse_args(arguments)


def _assumed_ranks(given: int | None, info: "RankInfo") -> int:
    """The ranks that a dry run assumes: those of --world-size, else those of this job."""
    if given is None:
        return info.world_size
    if not 1 <= given <= _MOST_RANKS:
        raise ConfigError(
            f"--world-size {printable(str(given), 20)} must be 1 to {_MOST_RANKS:,}; give the "
            "number of ranks that the run is to have"
        )
    return given


def _check(config: RunConfig, options: argparse.Namespace, info: RankInfo) -> None:
    """Refuse a run that could not train; the errors are those of its start."""
    from pipeline.launching.checks import check_run

    _resolve(config)
    check_run(config, _assumed_ranks(options.world_size, info), options.resume)
    print(config.run.dir)


def _notify(config: RunConfig, outcome: str, reason: str) -> None:
    """Tell what a job script knows of the run's end."""
    if outcome not in OUTCOMES:
        raise ConfigError(
            f"--notify {printable(outcome, 20)} must begin with one of {', '.join(OUTCOMES)}, the "
            "words of a verdict"
        )
    try:
        step = read_metrics(config.run.dir)[-1]["step"]
    except (ConfigError, IndexError):
        step = None
    notify(config.run, Ending(outcome, reason, cast(int | None, step)))


def _resolve(config: RunConfig) -> tuple[Device, Precision]:
    import torch

    device = resolve_device(config, torch.cuda.is_available())
    bf16_supported = device == "cpu" or torch.cuda.is_bf16_supported()
    return device, resolve_precision(config, device, bf16_supported)


def _print_dry_run(config: RunConfig, world_size: int) -> None:
    """Describe the run as on the machine it is meant for: a laptop may ask about a cluster."""
    import torch

    from pipeline.engine.init_from import planned_import
    from pipeline.reporting.run_summary import summarize_run
    from pipeline.review.schedule import planned

    device = resolve_device(config, torch.cuda.is_available() or config.train.device == "cuda")
    precision = resolve_precision(config, device)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is not an error
    # One process cannot hold a model of many parts; the smallest world that can is assumed.
    world_size = max(world_size, config.parallel.tensor * len(config.stage_plan))
    imported = planned_import(config)
    batch = config.global_batch_size(data_parallel_size(config, world_size))
    config, phases = planned(config, batch)
    print(*phases, sep="\n", end="\n" if phases else "")
    print(summarize_run(config, world_size=world_size, device=device, precision=precision))
    for line in imported:
        print(line)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.train") -> NoReturn:
    """Run the command line, then end this process with its exit code.

    Not by sys.exit: destructors of process groups whose peers are gone can wait forever.
    """
    code = main(arguments, prog)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
