"""Whether a run fits, before it is submitted: python -m pipeline.plan CONFIG --nodes N --gpu GPU.

Memory of a rank of each stage, item by item; traffic of a step by link; tokens a second, days and
cost. If it does not fit, which keys to change, by the same formulas. Reads the configuration alone:
no GPU, no shards, no torch. Times are computed from data sheets, not measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from foundation.command_line import exit_status
from model.errors import ConfigError
from pipeline.config.run_config import (
    RunConfig,
    data_parallel_size,
    load_config,
    resolve_precision,
)
from pipeline.planning.gpus import GPUS, machine_of
from pipeline.planning.layout import Machine
from pipeline.planning.plan_text import (
    candidate_lines,
    candidate_record,
    plan_lines,
    plan_record,
    verdict_line,
)
from pipeline.planning.run_plan import ELEMENT_BYTES, plan_run, run_time
from pipeline.planning.search import Candidate, enough_nodes, remedy, search
from pipeline.review.schedule import planned

EPILOG = """\
examples:
  PROG configs/7b.yaml --nodes 8 --gpu h100-80g --price 2.5
  PROG configs/7b.yaml --nodes 1 --gpu a100-40g --set parallel.zero=3 batch.micro_size=1
  PROG configs/7b.yaml --nodes 4 --gpu a100-80g --search

exit status: 0 the run fits, 1 it does not (with what to change) or it cannot be planned (in one
line), 2 wrong arguments
"""
_SHOWN = 8
_MOST_RANKS = 1 << 20


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.plan") -> int:
    """Run the command; give its exit code."""
    options = _parse(arguments, prog)
    return exit_status(lambda: _plan(options), ConfigError)


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("config", type=Path, help="the run's YAML file")
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--nodes", type=int, metavar="N", help="nodes of --gpus-per-node GPUs")
    ranks.add_argument("--world-size", type=int, metavar="N", help="GPUs, of all nodes together")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True, help="the GPU, in SXM form")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GBIT",
        help="Gbit/s of the network between nodes for each GPU (default: that of NVIDIA's systems)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values that win over the file",
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, in any currency")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank other layouts of the same step that fit, with the --set line of each",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (bytes, seconds)")
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.set)
    world_size = _ranks(options)
    batch = config.global_batch_size(data_parallel_size(config, world_size))
    config, phases = planned(config, batch)
    machine = _machine(config, options)
    plan = plan_run(config, world_size, machine)
    time = run_time(plan)
    found = search(config, world_size, machine)[:_SHOWN] if options.search else []
    mend = None if plan.fits else remedy(config, world_size, machine)
    if options.json:
        record = plan_record(plan, time, options.price)
        record["remedy"] = candidate_record(mend, options.price) if mend else None
        if options.search:
            record["search"] = [candidate_record(c, options.price) for c in found]
        print(json.dumps(record, indent=2))
        return 0 if plan.fits else 1
    print("\n".join([*phases, *plan_lines(plan, time, options.price), "", verdict_line(plan)]))
    if not plan.fits:
        print(_advice(config, world_size, machine, mend))
    if options.search:
        print("\n".join(["", "layouts of the same step that fit, fastest first"]))
        print("\n".join(candidate_lines(found) if found else ["none"]))
    return 0 if plan.fits else 1


def _advice(config: RunConfig, world_size: int, machine: Machine, mend: Candidate | None) -> str:
    """The change that makes the run fit, or the ranks that it needs."""
    if mend is not None:
        return f"it fits with  {_described(mend)}"
    enough = enough_nodes(config, world_size, machine)
    if enough is None:
        return "no layout of this step fits on any number of these GPUs: use ones with more memory"
    ranks, candidate = enough
    return f"no layout of this step fits on {world_size}; on {ranks} it does with  " + _described(
        candidate
    )


def _described(candidate: Candidate) -> str:
    gib = candidate.plan.peak_bytes / 2**30
    settings = candidate.settings()
    return (
        f"{f'--set {settings}' if settings else 'the configuration as it is'} "
        f"({gib:.1f} GiB, {candidate.time.tokens_per_s:,.0f} tokens/s)"
    )


def _ranks(options: argparse.Namespace) -> int:
    """The GPUs of the run."""
    given = options.world_size
    world_size: int = options.nodes * options.gpus_per_node if given is None else given
    least = min(options.gpus_per_node, world_size)
    if not 1 <= least <= world_size <= _MOST_RANKS:
        raise ConfigError(
            f"the plan is for {world_size} GPUs, {options.gpus_per_node} a node; give --nodes and "
            f"--gpus-per-node, or --world-size, with 1 to {_MOST_RANKS:,} GPUs in all"
        )
    return world_size


def _machine(config: RunConfig, options: argparse.Namespace) -> Machine:
    if config.train.device == "cpu":
        raise ConfigError(
            "train.device=cpu, and plans are for GPUs; add --set train.device=cuda, or see what "
            "the run comes to with python -m pipeline.train CONFIG --dry-run"
        )
    for name in ("network", "price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name}={value:g} must be above 0; give a number, or leave it out")
    return machine_of(
        options.gpu,
        gpus_per_node=options.gpus_per_node,
        network_gbit=options.network,
        element_bytes=ELEMENT_BYTES[resolve_precision(config, "cuda")],
    )


if __name__ == "__main__":
    sys.exit(main())
