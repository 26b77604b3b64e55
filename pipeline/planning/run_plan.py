"""A run's configuration on so many ranks of a machine: memory, traffic, time."""

from typing import NamedTuple

from pipeline.config.run_config import (
    Device,
    Precision,
    RunConfig,
    data_parallel_size,
)
from pipeline.planning.layout import Layout, Machine, Prediction, Work
from pipeline.planning.rank_memory import RankMemory, rank_memory
from pipeline.planning.step_time import predict_time, step_flops
from pipeline.planning.traffic import Traffic, rank_traffic

_DAY_S = 86_400
# Bytes of an element of each precision.
ELEMENT_BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}


class RunPlan(NamedTuple):
    """What a run comes to on a machine.

    Attributes:
        config: the run.
        work: the model and its step.
        layout: how ranks share it.
        machine: what they run on.
        memory: of a rank of each stage.
    """

    config: RunConfig
    work: Work
    layout: Layout
    machine: Machine
    memory: list[RankMemory]

    @property
    def peak_bytes(self) -> float:
        """The most that a rank of any stage takes, in a step or while it resumes."""
        return max(max(memory.total, memory.resume_total) for memory in self.memory)

    @property
    def fits(self) -> bool:
        """Whether no rank takes more than its machine has to fill."""
        return self.peak_bytes <= self.machine.memory_bytes

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.layout.samples * self.work.sequence_length

    def traffic(self) -> list[list[Traffic]]:
        """What a rank of each stage receives in a step."""
        return [
            rank_traffic(self.work, self.layout, self.machine, stage)
            for stage in range(len(self.layout.plan))
        ]

    def time(self) -> Prediction:
        """Of a step."""
        return predict_time(self.work, self.layout, self.machine)

    def flops(self) -> float:
        """Useful floating point operations of a step."""
        return step_flops(self.work, self.layout)


class RunTime(NamedTuple):
    """What a step's time comes to.

    Attributes:
        step_s: seconds of a step.
        tokens_per_s: over all ranks.
        days: of the whole run.
        gpu_hours: of all ranks together.
        flops_per_gpu: useful FLOP/s that a rank reaches.
        idle: share that each stage waits for others.
    """

    step_s: float
    tokens_per_s: float
    days: float
    gpu_hours: float
    flops_per_gpu: float
    idle: list[float]


def run_time(plan: RunPlan) -> RunTime:
    """How long a run takes."""
    predicted = plan.time()
    seconds = predicted.step_s * plan.config.last_step
    return RunTime(
        predicted.step_s,
        plan.tokens_per_step / predicted.step_s,
        seconds / _DAY_S,
        seconds / 3600 * plan.layout.ranks,
        plan.flops() / predicted.step_s / plan.layout.ranks,
        predicted.idle,
    )


def plan_run(config: RunConfig, world_size: int, machine: Machine) -> RunPlan:
    """What a run comes to on so many GPUs.

    Raises:
        ConfigError: the world size does not fit the layout.
    """
    work, layout = work_of(config, "cuda"), layout_of(config, world_size)
    return RunPlan(config, work, layout, machine, _of_stages(work, layout, machine))


def run_memory(
    config: RunConfig, *, world_size: int, device: Device, precision: Precision
) -> list[RankMemory]:
    """Memory of a rank of each stage, wherever a run is.

    Raises:
        ConfigError: the world size does not fit the layout.
    """
    machine = Machine(
        name=device,
        ranks_per_node=world_size,
        flops=1.0,
        lm_head_flops=1.0,
        intra_bandwidth=1.0,
        inter_bandwidth=1.0,
        latency_s=0.0,
        optimizer_s=0.0,
        memory_bytes=float("inf"),
        element_bytes=ELEMENT_BYTES[precision],
    )
    return _of_stages(work_of(config, device), layout_of(config, world_size), machine)


def work_of(config: RunConfig, device: Device) -> Work:
    """The model and the step of a configuration."""
    wanted = config.parallel.reduce_precision
    return Work(
        config.model,
        config.data.sequence_length,
        config.train.chunk_tokens(device),
        config.parallel.reduce_bucket_size,
        None if wanted == "auto" else wanted == "fp32",
        config.train.freeze,
    )


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """How so many ranks share a run.

    Raises:
        ConfigError: they cannot.
    """
    return Layout(
        config.stage_plan,
        data_parallel_size(config, world_size),
        config.parallel.tensor,
        config.parallel.zero,
        config.batch.micro_size,
        config.batch.accumulation,
        config.train.activation_checkpointing,
        config.parallel.zero_hpz_partition_size,
    )


def _of_stages(work: Work, layout: Layout, machine: Machine) -> list[RankMemory]:
    return [rank_memory(work, layout, machine, stage) for stage in range(len(layout.plan))]
