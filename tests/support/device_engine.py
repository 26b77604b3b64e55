"""One rank's engine on any device, and what a CPU computes without it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import joint_loss
from model.language_model import MultiTokenModel
from pipeline.config.run_config import Precision, RunConfig
from pipeline.distributed.rendezvous import RankInfo
from pipeline.distributed.topology import Topology
from pipeline.engine.build import DTYPES, build_engine
from pipeline.engine.engine import Engine
from tests.support.parity_runs import record_gradients

# What tests/gpu run on.
TEST_DEVICE = os.environ.get("HEADWAY_TEST_DEVICE", "cuda")
ROWS, SEQUENCE, VOCABULARY, HEADS, LEARNING_RATE = 8, 128, 512, 3, 1e-3


@dataclass(frozen=True)
class DeviceStep:
    """A step's results, on the CPU."""

    head_losses: Tensor
    grad_norm: float
    gradients: Mapping[str, Tensor]


def device_config(**sections: Mapping[str, Any]) -> RunConfig:
    """A model whose attention heads are 64 wide, as kernels of GPUs want them."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "device", "seed": 7},
        "model": {
            "layers": 6,
            "hidden_size": 256,
            "attention_heads": 4,
            "kv_heads": 2,
            "ffn_hidden_size": 512,
            "vocab_size": VOCABULARY,
            "future_tokens": HEADS,
        },
        "data": {"shards": "unused", "sequence_length": SEQUENCE},
        "parallel": {"zero": 0},
        "batch": {"micro_size": ROWS // 2, "accumulation": 2},
        "train": {"steps": 10, "device": "cpu"},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "schedule": {"warmup_steps": 1},
    }
    for name, section in sections.items():
        values[name] = values[name] | dict(section)
    return RunConfig.model_validate(values)


def micro_batches(step: int, config: RunConfig) -> list[Batch]:
    """A step's two micro-batches, on the CPU; of several documents if the run masks them."""
    generator = torch.Generator().manual_seed(step)
    window = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + HEADS), generator=generator)
    labels = torch.stack([window[:, k : k + SEQUENCE] for k in range(1, HEADS + 1)])
    labels[1, : ROWS // 2, : SEQUENCE // 2] = -100
    documents = None
    if config.data.document_mask:
        starts = torch.rand(ROWS, SEQUENCE, generator=generator) < 0.05
        documents = starts.cumsum(1, dtype=torch.int32)
    half = ROWS // 2
    return [
        Batch(
            window[rows, :SEQUENCE].contiguous(),
            labels[:, rows].contiguous(),
            None if documents is None else documents[rows],
        )
        for rows in (slice(0, half), slice(half, ROWS))
    ]


def single_rank(device: torch.device) -> Topology:
    """The grid of one rank, made anew; the process group of this process lasts."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return Topology(RankInfo(0, 0, 1), 1, device)


def train_on(
    device: torch.device, config: RunConfig, precision: Precision, steps: int = 1
) -> list[DeviceStep]:
    """Steps of the engine on one rank."""
    engine = build_engine(config, single_rank(device), precision)
    return take_steps(engine, steps)


def take_steps(engine: Engine, steps: int) -> list[DeviceStep]:
    """Steps of an engine, with the gradients that its optimizer steps with."""
    recorded: list[dict[str, Tensor]] = []
    record_gradients(engine, recorded)
    found = []
    for step in range(steps):
        result = engine.train_step(micro_batches(step, engine.config), LEARNING_RATE)
        assert result.applied
        gradients = {name: gradient.cpu() for name, gradient in recorded[-1].items()}
        found.append(DeviceStep(result.head_losses.cpu(), result.grad_norm, gradients))
    return found


def computed_on_cpu(config: RunConfig, precision: Precision = "fp32") -> DeviceStep:
    """The first step by torch's autograd alone: joint losses, no engine, no ZeRO."""
    single_rank(torch.device("cpu"))
    model = MultiTokenModel(config.model, dtype=DTYPES[precision])
    for name, parameter in model.named_parameters():
        initial = model.initial_weight(name, parameter.shape, config.run.seed)
        parameter.data.copy_(initial)
    batches = micro_batches(0, config)
    counts = torch.stack([(batch.labels != -100).sum((1, 2)) for batch in batches]).sum(0)
    scales = torch.tensor(config.model.loss_weights(0)) / counts
    sums = torch.zeros(HEADS)
    gradients = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        z = model(batch.tokens, documents=batch.documents)
        result = joint_loss(
            model, z, batch.labels, scales, chunk_tokens=256, documents=batch.documents
        )
        result.surrogate_loss.backward()
        sums += result.loss_sums
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] += parameter.grad
    square = sum(float(g.double().norm() ** 2) for g in gradients.values())
    return DeviceStep(sums / counts, square**0.5, gradients)
