"""One rank's part of a training arm: Headway in some layout, or DeepSpeed's own PipelineModule.

Both train the same model on the same batches. The usual way under PipelineModule: the last
stage forms the whole logits of every head and one loss of them all.

Legend: B batch, S sequence, V vocabulary, n heads.
"""

import contextlib
import io
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from megatron.core import parallel_state
from torch import Tensor, nn

from data_prep.loading.loader import Batch
from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.loss import VocabularyShard, loss_and_gradients
from model.structure.part import ModelPart
from pipeline.config.run_config import RunConfig
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.engine.deepspeed_config import deepspeed_config

SEED, LEARNING_RATE = 7, 1e-3


@dataclass(frozen=True)
class Workload:
    """A model and a step of it."""

    layers: int
    hidden_size: int
    vocab_size: int
    future_tokens: int
    sequence_length: int
    samples: int
    micro_size: int
    chunk_tokens: int

    @property
    def model(self) -> ModelConfig:
        """The model's sizes."""
        return ModelConfig(
            layers=self.layers,
            hidden_size=self.hidden_size,
            attention_heads=max(self.hidden_size // 64, 2),
            vocab_size=self.vocab_size,
            future_tokens=self.future_tokens,
        )


@dataclass(frozen=True, eq=False)
class Arm:
    """A way to train on some ranks; each is its own key.

    Attributes:
        name: for tables.
        world: ranks.
        stages: what each stage holds of the model, as in a configuration; `1` = one stage.
        zero: ZeRO level.
        engine: ours, or DeepSpeed's PipelineModule with the layers cut as `stages` says.
    """

    name: str
    world: int
    stages: Any
    zero: int
    engine: Literal["headway", "pipeline_module"] = "headway"


class ArmResult(NamedTuple):
    """What a rank saw.

    Attributes:
        step_s: of each timed step.
        cpu_s: processor time of a step.
        peak_bytes: growth of the resident set from before the model was built to its peak.
        first_loss: sum of all heads' mean losses in the first step.
        idle: measured share of the timed steps that each stage waited; empty where nobody counts.
    """

    step_s: list[float]
    cpu_s: float
    peak_bytes: int
    first_loss: float
    idle: list[float]


class Rates(NamedTuple):
    """What this machine reaches with all ranks at work.

    Attributes:
        layer_flops: FLOP/s of layers, forward and backward.
        lm_head_flops: FLOP/s of the chunked loss.
        bandwidth: bytes/s that a rank receives in a gather from all others.
        latency_s: of a small message in such a gather.
        optimizer_s: per parameter.
    """

    layer_flops: float
    lm_head_flops: float
    bandwidth: float
    latency_s: float
    optimizer_s: float


def run_config(workload: Workload, arm: Arm) -> RunConfig:
    """The run that an arm is."""
    sections: dict[str, Any] = {
        "run": {"name": "stages", "seed": SEED},
        "model": workload.model.model_dump(),
        "data": {"shards": "unused", "sequence_length": workload.sequence_length},
        "parallel": {"zero": arm.zero, "stages": arm.stages},
        "batch": {"micro_size": workload.micro_size},
        "train": {
            "steps": 1000,
            "device": "cpu",
            "precision": "fp32",
            "loss_chunk_tokens": workload.chunk_tokens,
        },
        "optimizer": {"learning_rate": LEARNING_RATE},
        "schedule": {"warmup_steps": 0},
    }
    stages = len(RunConfig.model_validate(sections).stage_plan)
    data = arm.world // stages
    sections["batch"]["accumulation"] = workload.samples // (workload.micro_size * data)
    return RunConfig.model_validate(sections)


def run_arm(workload: Workload, arm: Arm, timed_steps: int) -> ArmResult:
    """Train a step to warm up, then so many timed ones; call in a fresh rank."""
    config = run_config(workload, arm)
    before = _resident_peak()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    build = _headway if arm.engine == "headway" else _pipeline_module
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition
        step, idle_shares = build(workload, config)
    first_loss = step(0)
    idle_shares()
    seconds = []
    cpu_s = time.process_time()
    for number in range(1, timed_steps + 1):
        dist.barrier()
        started = time.perf_counter()
        step(number)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    cpu_s = (time.process_time() - cpu_s) / timed_steps
    return ArmResult(seconds, cpu_s, _resident_peak() - before, first_loss, idle_shares())


Steps = tuple[Callable[[int], float], Callable[[], list[float]]]


def _headway(workload: Workload, config: RunConfig) -> Steps:
    topology = Topology(
        rank_info(os.environ), 1, torch.device("cpu"), plan=config.stage_plan, timeout_s=120
    )
    engine = build_engine(config, topology, "fp32")

    def step(number: int) -> float:
        batches = local_batches(workload, number, topology.data_rank, topology.data_size)
        return float(engine.train_step(batches, LEARNING_RATE).head_losses.sum())

    return step, engine.execution.idle_fractions


def local_batches(workload: Workload, step: int, data_rank: int, data_size: int) -> list[Batch]:
    """A rank's micro-batches of a step, dealt as the loader deals them."""
    heads, length = workload.future_tokens, workload.sequence_length
    generator = torch.Generator().manual_seed(step)
    shape = (workload.samples, length + heads)
    window = torch.randint(0, workload.vocab_size, shape, generator=generator)
    labels = torch.stack([window[:, k : k + length] for k in range(1, heads + 1)])
    micro = workload.micro_size
    starts = range(data_rank * micro, workload.samples, data_size * micro)
    return [
        Batch(window[s : s + micro, :length].contiguous(), labels[:, s : s + micro].contiguous())
        for s in starts
    ]


class _TrunkLayer(nn.Module):
    """One trunk layer of ours, the first with the embedding, as a layer of a PipelineModule."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.model = _part(config, ModelPart(range(number, number + 1), range(0)))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.model(inputs)
        return output


class _JointHeads(nn.Module):
    """All heads at once: whole logits `[n, S * B, V]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = _part(config, ModelPart(range(0), range(1, config.future_tokens + 1)))

    def forward(self, trunk_output: Tensor) -> Tensor:
        heads = self.model.heads
        norm, unembedding = heads.lm_head()
        context = self.model.context(trunk_output.shape[0], trunk_output.device)
        return torch.stack(
            [
                heads.lm_head.normalize(heads.hidden(k, trunk_output, context), norm).flatten(0, 1)
                @ unembedding.t()
                for k in heads.numbers
            ]
        )


def _part(config: ModelConfig, part: ModelPart) -> MultiTokenModel:
    model = MultiTokenModel(config, part=part)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(model.initial_weight(name, parameter.shape, SEED))
    return model


def _joint_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the heads of their mean losses."""
    targets = labels.transpose(1, 2).flatten(1)
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)]).sum()


class _CutAsPlanned(PipelineModule):
    """A PipelineModule whose stages are given, not found by counting parameters."""

    def __init__(self, cuts: list[int], **options: Any) -> None:
        self.cuts = cuts
        super().__init__(**options)

    def _partition_layers(self, method: str = "uniform") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self.cuts
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def _pipeline_module(workload: Workload, config: RunConfig) -> Steps:
    """DeepSpeed's pipeline with the plan of `config`, where the last stage has all heads."""
    parallel_state.initialize_model_parallel(1, 1)
    deepspeed.init_distributed(dist_init_required=False)
    model, plan = config.model, config.stage_plan
    layers = [LayerSpec(_TrunkLayer, model, number) for number in range(model.trunk_layers)]
    cuts = [part.trunk_layers.start for part in plan if part.trunk_layers]
    cuts += [model.trunk_layers] if not plan[-1].trunk_layers else []
    module = _CutAsPlanned(
        [*cuts, model.trunk_layers + 1],
        layers=[*layers, LayerSpec(_JointHeads, model)],
        num_stages=len(plan),
        loss_fn=_joint_loss,
    )
    data_size = dist.get_world_size() // len(plan)
    settings = deepspeed_config(
        config, data_parallel_size=data_size, precision="fp32", device="cpu"
    )
    del settings["managed_gradient_accumulation"]  # the pipeline does it itself
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def step(number: int) -> float:
        rank = engine.grid.get_data_parallel_id()
        batches = local_batches(workload, number, rank, data_size)
        samples: Iterator[tuple[Tensor, Tensor]] = iter([(b.tokens, b.labels) for b in batches])
        return float(engine.train_batch(samples))

    return step, list


def measure_rates(workload: Workload, repeats: int) -> Rates:
    """What this rank reaches while all others do the same; medians."""
    parallel_state.initialize_model_parallel(1, 1)
    model, tokens = workload.model, workload.micro_size * workload.sequence_length
    layer = _part(model, ModelPart(range(1, 2), range(0)))
    shape = (workload.sequence_length, workload.micro_size, workload.hidden_size)
    hidden = torch.randn(shape, requires_grad=True)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    layer_s = _median_s(lambda: layer(hidden).sum().backward(), repeats)
    unembedding = torch.randn(workload.vocab_size, workload.hidden_size)
    gradient, labels = torch.zeros_like(unembedding), torch.zeros(tokens, dtype=torch.int64)
    lm_head_s = _median_s(
        lambda: loss_and_gradients(
            hidden.detach().flatten(0, 1),
            unembedding,
            labels,
            shard=VocabularyShard(0, workload.vocab_size, None),
            scale=1.0,
            weight_gradient=gradient,
            chunk_tokens=workload.chunk_tokens,
        ),
        repeats,
    )
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    optimizer_s = _median_s(optimizer.step, repeats)
    per_token = 6 * (matrices + workload.sequence_length * workload.hidden_size)
    return Rates(
        per_token * tokens / layer_s,
        6 * tokens * unembedding.numel() / lm_head_s,
        *_gather_rates(matrices, repeats),
        optimizer_s / sum(p.numel() for p in layer.parameters()),
    )


def _gather_rates(elements: int, repeats: int) -> tuple[float, float]:
    """Bytes/s that a rank receives in a gather of a layer's weights, and seconds of a tiny one."""
    world = dist.get_world_size()

    def gather_s(size: int) -> float:
        mine = torch.zeros(size // world)
        whole = torch.zeros(mine.numel() * world)
        return _median_s(lambda: dist.all_gather_into_tensor(whole, mine), repeats)

    latency_s = gather_s(world) / (world - 1)
    received = 4 * elements * (world - 1) / world
    elapsed_s = gather_s(elements)
    transfer_s = max(elapsed_s - (world - 1) * latency_s, elapsed_s / 2)  # noise, in tiny sizes
    return received / transfer_s, latency_s


def _median_s(action: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):
        dist.barrier()
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
