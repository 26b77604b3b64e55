"""Whether a cluster is fit for a run: python -m pipeline.doctor CONFIG, alone, or by the launcher.

Devices, versions, code and clocks of all ranks; an all-reduce and a ring; shards; whether run.dir
is one folder for all, its file system and its room; a step of a tiny model in the run's layout, its
gradients against one process. One line a check. Leaves nothing behind, takes no lease, and touches
no run.
"""

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.errors import DataError
from foundation.shown_text import told
from model.errors import ConfigError
from pipeline.config.run_config import (
    Device,
    Precision,
    RunConfig,
    load_config,
    resolve_device,
    resolve_precision,
    world_problems,
)
from pipeline.distributed.cuda_settings import prepare_cuda
from pipeline.distributed.launch import Launch
from pipeline.distributed.rendezvous import RankInfo, device_index, rank_info, rendezvous
from pipeline.reporting.run_log import quieten_libraries

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pipeline.diagnosis.check import Line, Outcome
    from pipeline.distributed.topology import Topology

EPILOG = """\
examples:
  PROG configs/quickstart.yaml
  torchrun --nproc-per-node 8 -m pipeline.doctor configs/1b.yaml
  srun python -m pipeline.doctor configs/7b.yaml --full

exit status: 0 all is well (the last line is OK), 1 something is to be mended (the last lines say
what), 2 wrong arguments
"""
_EXIT_TO_MEND = 1
_TIMEOUT_MARGIN_S = 60.0
_SEEN_SHARE = 1 / 8  # of the time limit, until a new file is seen on every node


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.doctor") -> int:
    """Run the command; give its exit code."""
    options = _parse(arguments, prog)
    quieten_libraries()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    info = RankInfo(0, 0, 1)
    try:
        info = rank_info(os.environ)
        launch = Launch(info, os.environ, orphaned=lambda reason: _end_orphan(info, reason))
        config = load_config(options.config, options.set)
        prepare_cuda(
            os.environ, stages=len(config.stage_plan), deterministic=config.train.deterministic
        )
        return _examine(config, options, launch)
    except (ConfigError, DataError) as error:
        _say(f"error: {_of_rank(info)}{error}")
    except OSError as error:
        _say(f"error: {_of_rank(info)}{told(error)}")
    except Exception as error:
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        _say(f"error: {_of_rank(info)}{type(error).__name__}: {first_line}")
    return _EXIT_TO_MEND


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
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
        help="values that win over the file",
    )
    parser.add_argument("--full", action="store_true", help="read every shard from end to end")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        metavar="N",
        help="also train N steps at full width, with as few layers as the stages allow (default 0)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds after which a check counts as hung; training ones get 4 times as much (120)",
    )
    return parser.parse_args(arguments)


def _examine(config: RunConfig, options: argparse.Namespace, launch: Launch) -> int:
    """Meet the other ranks, make all checks, and say what came out."""
    import torch

    info = launch.info
    kind = resolve_device(config, torch.cuda.is_available())
    precision = resolve_precision(config, kind, kind == "cpu" or torch.cuda.is_bf16_supported())
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there are GPUs that this run leaves alone
    device = _device(kind, info)
    # Imported late, as by pipeline.train.
    from pipeline.distributed.identity import Identity
    from pipeline.distributed.meeting import start_process_group

    started = time.perf_counter()
    timeout_s = max(config.train.timeout_s, 4 * options.time_limit + _TIMEOUT_MARGIN_S)
    # Ranks that differ may meet here: all that is wrong is found, not the first of it.
    start_process_group(info, device, timeout_s, launch, Identity(socket.gethostname(), {}, {}))
    met = f"1 rank alone in {time.perf_counter() - started:.1f} s"
    if info.world_size > 1:
        address, port = rendezvous(os.environ)
        met = f"{info.world_size} ranks met at {address}:{port} in "
        met += f"{time.perf_counter() - started:.1f} s"
    from pipeline.diagnosis.check import BrokenOffError

    problems: list[str] = []
    try:
        for line in _checks(config, options, info, device, precision, met):
            if info.rank == 0:
                _print(line)
            problems += line.outcome.problems
    except BrokenOffError as error:
        _say(f"error: {_of_rank(info)}{error}")
        return _EXIT_TO_MEND
    if info.rank == 0:
        print("\n".join(["to mend:", *(f"  {p}" for p in problems)]) if problems else "OK")
    return _EXIT_TO_MEND if problems else 0


def _device(kind: Device, info: RankInfo) -> "torch.device":
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    index = device_index(info, torch.cuda.device_count(), os.environ)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _checks(
    config: RunConfig,
    options: argparse.Namespace,
    info: RankInfo,
    device: "torch.device",
    precision: Precision,
    met: str,
) -> "Iterator[Line]":
    """Make every check, one after the other; what needs a check that failed is left out."""
    from data_prep.verify import find_problems
    from pipeline.diagnosis import machine, network, storage
    from pipeline.diagnosis.check import Context, Line, Outcome, run_checks
    from pipeline.diagnosis.data import data_checks
    from pipeline.diagnosis.probe_folder import ProbeFolder
    from pipeline.diagnosis.time_limit import TimeLimit, meeting_store
    from pipeline.diagnosis.training_step import training_checks

    probe = ProbeFolder(config.run.dir)
    limit = TimeLimit(meeting_store(), info, options.time_limit, probe.remove)
    context = Context(
        config,
        info,
        device,
        precision,
        topology=None,
        folder=probe.path,
        meeting=met,
        full=options.full,
        seen_within_s=options.time_limit * _SEEN_SHARE,
    )
    yield from run_checks((*machine.CHECKS, *network.CHECKS), context, limit)
    topology, outcome = None, _layout_outcome(config, info)
    if not outcome.problems and not world_problems(config, info.world_size):
        with limit.watch("layout"):
            topology = _topology(config, info, device)
            limit.looked(None)
    yield Line("layout", outcome)
    context = replace(context, topology=topology)
    yield from run_checks(data_checks(find_problems), context, limit)
    try:
        with limit.watch("run.dir"):
            probe.make()
            limit.looked(None)
    except ConfigError as error:
        yield Line("run.dir", Outcome("cannot be written", [str(error)]))
        return
    try:
        (shared,) = run_checks((storage.SHARED,), context, limit)
        yield shared
        if not shared.outcome.problems:
            yield from run_checks(storage.CHECKS, context, limit)
            if topology is not None:
                yield from run_checks(training_checks(options.steps), context, limit)
        probe.wait_for_all()
    finally:
        probe.remove_by_main()


def _layout_outcome(config: RunConfig, info: RankInfo) -> "Outcome":
    """Whether these are the ranks of the run; one process alone may be asked all the same."""
    from pipeline.diagnosis.check import Outcome

    problems = world_problems(config, info.world_size)
    if not problems:
        data = info.world_size // (config.parallel.tensor * len(config.stage_plan))
        return Outcome(
            f"{data} data x {config.parallel.tensor} tensor x {len(config.stage_plan)} stages, "
            f"ZeRO {config.parallel.zero}"
        )
    if info.world_size == 1:
        return Outcome("not tried by one process alone; start the doctor by torchrun or srun")
    return Outcome(f"not possible with {info.world_size} ranks", problems)


def _topology(config: RunConfig, info: RankInfo, device: "torch.device") -> "Topology":
    from pipeline.diagnosis.trial import trial_config
    from pipeline.distributed.topology import Topology

    plan = trial_config(config, "own", "fp32").stage_plan
    return Topology(
        info, config.parallel.tensor, device, plan=plan, timeout_s=config.train.timeout_s
    )


def _print(line: "Line") -> None:
    mark = "mend" if line.outcome.problems else "ok"
    print(f"{mark:5} {line.name:12} {line.outcome.figure}", flush=True)


def _end_orphan(info: RankInfo, reason: str) -> NoReturn:
    """End a rank that nobody would stop any more."""
    _say(f"error: {_of_rank(info)}stopping, because {reason}")
    os._exit(_EXIT_TO_MEND)


def _of_rank(info: RankInfo) -> str:
    return f"rank {info.rank}/{info.world_size}: " if info.world_size > 1 else ""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(
    arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.doctor"
) -> NoReturn:
    """Run the command line, then end this process with its exit code.

    Not by sys.exit: destructors of process groups whose peers are gone can wait forever.
    """
    code = main(arguments, prog)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
