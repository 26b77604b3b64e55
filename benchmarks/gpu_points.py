"""One measurement of training on a GPU: tokens a second, model FLOPS utilization, peak memory.

Each point runs in a process of its own, so that its peak of memory is its own.
"""

import os
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

# Layers (trunk and heads together), hidden size, attention heads 128 wide: the paper's 0.3B, 1.3B
# and 3B; `tiny` is for trying the script on a CPU.
SIZES = {"0.3b": (12, 1024), "1b": (24, 2048), "3b": (36, 2560), "tiny": (9, 128)}


@dataclass(frozen=True)
class Point:
    """What is trained, and how.

    Attributes:
        size: of `SIZES`.
        heads: n; parameters do not depend on it.
        micro: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        sequence: S.
        vocabulary: V.
        zero: ZeRO level.
        checkpointing: of activations.
        backward: of the heads.
        attention: kernel.
        chunk: tokens whose logits exist at once; 0 = auto.
        compiled: whether torch.compile makes kernels; auto = on a GPU.
        documents: whether documents are kept apart.
        steps: that are timed, after two that warm up (kernels are compiled in the first).
    """

    size: str
    heads: int = 4
    micro: int = 4
    accumulation: int = 4
    sequence: int = 4096
    vocabulary: int = 32_768
    zero: int = 1
    checkpointing: str = "none"
    backward: str = "sequential"
    attention: str = "auto"
    chunk: int = 0
    compiled: bool | str = "auto"
    documents: bool = False
    steps: int = 3

    def configuration(self, device: str) -> dict[str, Any]:
        """Of a run."""
        layers, hidden = SIZES[self.size]
        return {
            "run": {"name": "gpu"},
            "model": {
                "layers": layers,
                "hidden_size": hidden,
                "attention_heads": max(hidden // 128, 1),
                "vocab_size": self.vocabulary,
                "future_tokens": self.heads,
            },
            "data": {
                "shards": "unused",
                "sequence_length": self.sequence,
                "document_mask": self.documents,
            },
            "parallel": {"zero": self.zero},
            "batch": {"micro_size": self.micro, "accumulation": self.accumulation},
            "train": {
                "steps": 1000,
                "device": device,
                "activation_checkpointing": self.checkpointing,
                "head_backward": self.backward,
                "attention": self.attention,
                "compile": self.compiled,
                "loss_chunk_tokens": self.chunk or "auto",
            },
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"warmup_steps": 1},
        }


def prepare(device_type: str) -> None:
    """Import what `measure` needs, without touching the device."""
    os.environ["DS_ACCELERATOR"] = device_type
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import pipeline.engine.build  # noqa: F401


def measure(point: Point, device_type: str, trace: bool = False) -> dict[str, Any]:
    """Train a few steps; call in a fresh process.

    Args:
        point: what to measure.
        device_type: cuda or cpu.
        trace: also profile one step, by kernel.

    Returns:
        The point, what `auto` was (`compiled_used`, `attention_used`), `tokens_per_s`, `step_s`
        (median), `mfu` (None where the device's peak is not known), `peak_gib` of the timed steps,
        `start_peak_gib` of what was before them, and with `trace` the `kernels`, or `trace_error`.
    """
    prepare(device_type)
    import torch
    import torch.distributed as dist

    from pipeline.config.run_config import RunConfig
    from pipeline.distributed.rendezvous import RankInfo
    from pipeline.distributed.topology import Topology
    from pipeline.engine.build import build_engine
    from pipeline.reporting.hardware import peak_flops

    is_gpu = device_type == "cuda"
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if is_gpu else "gloo", store=store, rank=0, world_size=1)
    config = RunConfig.model_validate(point.configuration(device_type))
    engine = build_engine(
        config, Topology(RankInfo(0, 0, 1), 1, device), "bf16" if is_gpu else "fp32"
    )
    batches = _batches(point)
    seconds = []
    start_peak_gib = 0.0
    for number in range(2 + point.steps):
        if number == 2:
            start_peak_gib = _peak_gib(is_gpu)
            if is_gpu:  # compilers try kernels in memory of their own
                torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        engine.train_step(batches, 1e-4)
        if is_gpu:
            torch.cuda.synchronize(device)
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds)
    tokens_per_s = config.tokens_per_step(1) / step_s
    peak = peak_flops(torch.cuda.get_device_name(device)) if is_gpu else None
    found = asdict(point) | {
        "parameters": config.model.parameter_count().total,
        "compiled_used": engine.model.compiles_kernels,
        "attention_used": _attention(engine.model),
        "tokens_per_s": tokens_per_s,
        "step_s": step_s,
        "mfu": tokens_per_s * config.flops_per_token / peak if peak else None,
        "peak_gib": _peak_gib(is_gpu),
        "start_peak_gib": start_peak_gib,
    }
    if trace:
        try:
            found["kernels"] = _kernels(lambda: engine.train_step(batches, 1e-4), is_gpu)
        except Exception as error:  # what was measured does not need it
            found["trace_error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def _attention(model: Any) -> str | None:
    """The kernel that attention computes with; None when torch chooses."""
    backend = next((attention.backend for attention in model._attentions), None)
    return None if backend is None else str(backend)


def _batches(point: Point) -> list[Any]:
    import torch

    from data_prep.loading.loader import Batch

    generator, batches = torch.Generator().manual_seed(1), []
    for _ in range(point.accumulation):
        shape = (point.micro, point.sequence + point.heads)
        window = torch.randint(0, point.vocabulary, shape, generator=generator)
        numbers = range(1, point.heads + 1)
        labels = torch.stack([window[:, k : k + point.sequence] for k in numbers])
        documents = None
        if point.documents:
            starts = torch.rand(point.micro, point.sequence, generator=generator) < 1 / 512
            documents = starts.cumsum(1, dtype=torch.int32)
        batches.append(Batch(window[:, : point.sequence].contiguous(), labels, documents))
    return batches


def _peak_gib(is_gpu: bool) -> float:
    if is_gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _kernels(step: Any, is_gpu: bool) -> list[dict[str, Any]]:
    """The kernels (on a CPU operations) that take most of a step's time, at most 40."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_gpu else [])
    with profile(activities=activities) as profiler:
        step().head_losses.tolist()
    rows = []
    for event in profiler.key_averages():
        if is_gpu and event.device_type.name != "CUDA":
            continue  # an operation, whose kernels have rows of their own
        time_us = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        if time_us > 0:
            rows.append({"kernel": event.key[:160], "ms": time_us / 1000, "calls": event.count})
    return sorted(rows, key=lambda row: -row["ms"])[:40]
