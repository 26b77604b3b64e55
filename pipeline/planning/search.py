"""Other layouts of the same step on the same GPUs: which fit, which is fastest, what to change."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from pydantic import ValidationError

from model.errors import ConfigError
from pipeline.config.run_config import RunConfig
from pipeline.planning.layout import Machine
from pipeline.planning.run_plan import RunPlan, RunTime, plan_run, run_time
from pipeline.stages.plan import MAX_STAGES, num_stages

_MICRO_SIZES = (1, 2, 4, 8, 16, 32)
_ZERO = (1, 2, 3)
# What the bucket may shrink to where it is in the way.
_SMALL_BUCKET = 50_000_000
_MOST_RANKS = 1 << 16

Changes = Mapping[str, Any]


class Candidate(NamedTuple):
    """A layout that fits.

    Attributes:
        changes: keys that differ from the configuration's, with their values.
        plan: what it comes to.
        time: how long it takes.
    """

    changes: Changes
    plan: RunPlan
    time: RunTime

    def settings(self) -> str:
        """What to give `--set`; empty for the configuration itself."""
        return " ".join(f"{key}={_text(value)}" for key, value in self.changes.items())


def search(config: RunConfig, world_size: int, machine: Machine) -> list[Candidate]:
    """All layouts that fit, fastest first; among equally fast ones those of fewer changes.

    Every candidate has the step's samples of the configuration on as many ranks.

    Raises:
        ConfigError: the configuration itself does not go on so many ranks.
    """
    found = []
    samples = plan_run(config, world_size, machine).layout.samples
    for changes in _candidates(config, world_size, samples, machine):
        plan = _plan_with(config, changes, world_size, machine)
        if plan is not None and plan.fits:
            found.append(Candidate(changes, plan, run_time(plan)))
    return sorted(found, key=lambda c: (round(c.time.step_s, 3), len(c.changes)))


def remedy(config: RunConfig, world_size: int, machine: Machine) -> Candidate | None:
    """What to change so that a run fits: as few keys as possible, of these the fastest.

    `batch.accumulation` follows from the others and does not count.
    """
    fitting = search(config, world_size, machine)
    if config.parallel.reduce_bucket_size > _SMALL_BUCKET:
        change = {"parallel.reduce_bucket_size": _SMALL_BUCKET}
        plan = _plan_with(config, change, world_size, machine)
        if plan is not None and plan.fits:
            fitting.append(Candidate(change, plan, run_time(plan)))

    def cost(candidate: Candidate) -> tuple[int, float]:
        return len(candidate.changes.keys() - {"batch.accumulation"}), candidate.time.step_s

    return min(fitting, key=cost, default=None)


def enough_nodes(
    config: RunConfig, world_size: int, machine: Machine
) -> tuple[int, Candidate] | None:
    """The least power of two times these ranks on which some layout of the same step fits."""
    samples = plan_run(config, world_size, machine).layout.samples
    while world_size < _MOST_RANKS:
        world_size *= 2
        for changes in _candidates(config, world_size, samples, machine):
            plan = _plan_with(config, changes, world_size, machine)
            if plan is not None and plan.fits:
                return world_size, Candidate(changes, plan, run_time(plan))
    return None


def _candidates(
    config: RunConfig, world_size: int, samples: int, machine: Machine
) -> Iterator[dict[str, Any]]:
    """The changes of every layout of so many ranks whose step has so many samples."""
    own = _own_values(config)
    for stages, tensor in _shares(config, world_size, machine):
        data = world_size // (tensor * num_stages(stages))
        sizes = sorted({*_MICRO_SIZES, config.batch.micro_size})
        zero = sorted({*_ZERO, config.parallel.zero})
        for micro_size, level, checkpointing in product(sizes, zero, ("none", "full")):
            accumulation, rest = divmod(samples, data * micro_size)
            if rest or not accumulation:
                continue
            for neighbors in _neighbors(machine, stages, tensor, data, level):
                values = {
                    "parallel.stages": stages,
                    "parallel.tensor": tensor,
                    "parallel.zero": level,
                    "parallel.zero_hpz_partition_size": neighbors,
                    "batch.micro_size": micro_size,
                    "batch.accumulation": accumulation,
                    "train.activation_checkpointing": checkpointing,
                }
                yield {key: value for key, value in values.items() if value != own[key]}


def _shares(config: RunConfig, world_size: int, machine: Machine) -> Iterator[tuple[Any, int]]:
    """Stages and tensor sizes that divide the ranks; tensor parallelism stays within a node."""
    model, own = config.model, config.parallel.stages
    counts = [1, *(f"auto:{2**k}" for k in range(1, 8) if 2**k <= min(model.layers, MAX_STAGES))]
    options: list[Any] = counts if own in counts else [own, *counts]
    for stages, tensor in product(options, model.tensor_parallel_sizes):
        whole = world_size % (tensor * num_stages(stages)) == 0
        if whole and tensor <= machine.ranks_per_node:
            yield stages, tensor


def _neighbors(machine: Machine, stages: Any, tensor: int, data: int, zero: int) -> tuple[int, ...]:
    """No copy among neighbors; for ZeRO-3 over several nodes also one in each node."""
    within = machine.ranks_per_node // tensor
    possible = zero == 3 and num_stages(stages) == 1 and 1 < within < data
    return (1, within) if possible and data % within == 0 else (1,)


def _own_values(config: RunConfig) -> dict[str, Any]:
    return {
        "parallel.stages": config.parallel.stages,
        "parallel.tensor": config.parallel.tensor,
        "parallel.zero": config.parallel.zero,
        "parallel.zero_hpz_partition_size": config.parallel.zero_hpz_partition_size,
        "batch.micro_size": config.batch.micro_size,
        "batch.accumulation": config.batch.accumulation,
        "train.activation_checkpointing": config.train.activation_checkpointing,
    }


def _plan_with(
    config: RunConfig, changes: Changes, world_size: int, machine: Machine
) -> RunPlan | None:
    """The plan with some keys changed; None where a rule of configurations forbids it."""
    try:
        return plan_run(changed(config, changes), world_size, machine)
    except (ConfigError, ValidationError):
        return None


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The configuration with some keys changed, checked by its own rules.

    Raises:
        ValidationError: the changed one breaks a rule.
    """
    if not changes:
        return config
    sections: dict[str, Any] = {name: getattr(config, name) for name in RunConfig.model_fields}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values = sections[section]
        given = values if isinstance(values, dict) else values.model_dump()
        sections[section] = given | {name: value}
    return RunConfig.model_validate(sections)


def _text(value: Any) -> str:
    if isinstance(value, tuple):  # a listed plan of stages, which the shell must not divide
        stages = ", ".join(
            "{" + ", ".join(f"{kind}: {span}" for kind, span in stage.items()) + "}"
            for stage in value
        )
        return f"'[{stages}]'"
    return str(value)
