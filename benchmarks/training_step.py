"""What one training step needs: memory and time; sequential heads, joint loss, frozen trunk.

Legend: B batch, S sequence, V vocabulary, n heads.
"""

import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saved_tensors import SavedTensorMeter
from benchmarks.workload import Measurement, Mode, Point, Workload
from model.backward import sequential_backward
from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.structure.freezing import freeze_parameters
from model.structure.process_groups import ensure_single_process


def measure(workload: Workload, point: Point, device_type: str, timed_steps: int) -> Measurement:
    """Build the model and take one step; call in a fresh process, whose peak it reads."""
    device = torch.device(device_type)
    ensure_single_process()
    base = _resident_peak()
    model = _build(workload, point, device)
    tokens, labels = _batch(workload, point, device)
    with SavedTensorMeter(excluded=model.parameters()) as meter:
        _step(model, tokens, labels, workload, point.mode)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = _resident_peak() - base
    seconds = []
    for _ in range(timed_steps):
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was launched before is not this step's
        started = time.perf_counter()
        _step(model, tokens, labels, workload, point.mode)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Measurement(meter.peak, peak, statistics.median(seconds) if seconds else None)


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _build(workload: Workload, point: Point, device: torch.device) -> MultiTokenModel:
    ensure_single_process()
    config = ModelConfig(
        layers=workload.layers,
        hidden_size=workload.hidden_size,
        attention_heads=workload.hidden_size // 64,
        vocab_size=point.vocabulary,
        future_tokens=point.heads,
        head_kind=workload.kind,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MultiTokenModel(config, dtype=dtype).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=config.init_std)
    freeze_parameters(model, "trunk" if point.mode == "frozen" else "none")
    return model


def _batch(workload: Workload, point: Point, device: torch.device) -> tuple[Tensor, Tensor]:
    length = workload.sequence
    window = torch.randint(0, point.vocabulary, (workload.batch, length + point.heads))
    labels = torch.stack([window[:, k : k + length] for k in range(1, point.heads + 1)])
    return window[:, :length].clone().to(device), labels.to(device)


def _step(
    model: MultiTokenModel, tokens: Tensor, labels: Tensor, workload: Workload, mode: Mode
) -> None:
    """Forward and backward of one micro-batch; the optimizer's step needs the same in both."""
    if mode == "joint":
        _joint_loss(model, tokens, labels).backward()
        return
    scales = torch.full((len(labels),), 1 / tokens.numel(), device=tokens.device)
    result = sequential_backward(
        model, model(tokens), labels, scales, chunk_tokens=workload.chunk_tokens
    )
    result.surrogate_loss.backward()


def _joint_loss(model: MultiTokenModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """The usual loss: whole logits of every head, torch's cross-entropy, one sum."""
    norm, unembedding = model.heads.lm_head()
    trunk_output = model(tokens)
    context = model.context(tokens.shape[1], tokens.device)

    def head_loss(head: int, hidden: Tensor) -> Tensor:
        logits = model.heads.lm_head.normalize(hidden, norm).flatten(0, 1) @ unembedding.t()
        return F.cross_entropy(logits.float(), labels[head - 1].t().flatten())

    outputs = model.heads.outputs(trunk_output, context)
    return torch.stack([head_loss(head, hidden) for head, hidden in outputs]).sum()
