"""Engines for tests in any layout, on batches that are the same ones forever."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.loading.loader import Batch
from model.structure.sharding import merge_slices, placement_of
from pipeline.config.run_config import Precision, RunConfig
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from tests.support.head_variants import VARIANTS

# By a short name: `model.memory`, for sequences of three segments, the last one shorter.
_SIZES = {"segment": 5, "summary": 3, "sensory": 2, "cache": 2, "width": 16, "bptt": 1}
MEMORIES: dict[str, dict[str, Any] | None] = {
    "": None,
    "windows": _SIZES,
    "whole": _SIZES | {"bptt": 9},
    "stage 1": _SIZES | {"retrieval": False},
    "paper": _SIZES | {"mode": "paper", "bptt": 0},
    "adapters": _SIZES | {"adapter_rank": 3, "adapter_alpha": 6.0},
    "strict_score": _SIZES | {"mode": "strict_score", "summary": 1},
}
GLOBAL_BATCH, SEQUENCE, VOCABULARY, HEADS = 8, 12, 96, 3
DEFAULT_BUCKET, TINY_BUCKET = 500_000_000, 100


@dataclass(frozen=True)
class Case:
    """A layout and the ways of computing that must not change the result.

    Attributes:
        stages: `1`, or what each stage holds, as in `trunk 0-1|trunk 2|heads 1-2|heads 3`.
        neighbors: `parallel.zero_hpz_partition_size`.
        compiled: `train.compile`.
        heads: one of `VARIANTS`.
        memory: one of `MEMORIES`.
        eps: Adam's. With one far below the gradients an entry as small as its own rounding error
            moves by the learning rate either way, and with it what is compared of later steps.
    """

    world: int = 1
    tensor: int = 1
    zero: int = 0
    accumulation: int = 1
    bucket: int = DEFAULT_BUCKET
    backward: str = "sequential"
    checkpointing: str = "none"
    documents: bool = False
    freeze: str = "none"
    stages: str = "1"
    neighbors: int = 1
    compiled: bool = False
    heads: str = "parallel"
    memory: str = ""
    eps: float = 1e-8
    precision: Precision = "fp32"

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.stages.count("|") + 1

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.num_stages)


def engine_config(case: Case) -> RunConfig:
    """A model with three trunk layers and three heads, laid out as the case says."""
    variant = VARIANTS[case.heads]
    linear = variant.get("head_kind") == "linear"
    return RunConfig.model_validate(
        {
            "run": {"name": "parity", "seed": 7},
            "model": {
                "layers": 3 + (0 if linear else 3 * variant.get("head_layers", 1)),
                "hidden_size": 32,
                "attention_heads": 4,
                "kv_heads": 2,
                "ffn_hidden_size": 64,
                "vocab_size": VOCABULARY,
                "future_tokens": HEADS,
                "head_weights": [1.0, 0.5, 2.0],
                **_remembering(case.memory),
                **variant,
            },
            "data": {
                "shards": "unused",
                "sequence_length": SEQUENCE,
                "document_mask": case.documents,
            },
            "parallel": {
                "tensor": case.tensor,
                "zero": case.zero,
                "reduce_bucket_size": case.bucket,
                "stages": _stages(case.stages),
                "zero_hpz_partition_size": case.neighbors,
            },
            "batch": {
                "micro_size": GLOBAL_BATCH // (case.data_size * case.accumulation),
                "accumulation": case.accumulation,
            },
            "train": {
                "steps": 10,
                "precision": case.precision,
                "device": "cpu",
                "head_backward": case.backward,
                "activation_checkpointing": case.checkpointing,
                "loss_chunk_tokens": 16,
                "compile": case.compiled,
                "freeze": case.freeze,
                # A frozen model must come from somewhere; engines are given the weights, or none.
                "init_from": None if case.freeze == "none" else "unused",
            },
            "optimizer": {"learning_rate": 1e-3, "gradient_clipping": 0.5, "eps": case.eps},
            "schedule": {"warmup_steps": 1},
        }
    )


def _remembering(memory: str) -> dict[str, Any]:
    """Keys of a model with a memory, whose weights are large enough that it prefers some."""
    sizes = MEMORIES[memory]
    if sizes is None:
        return {}
    return {"memory": sizes, "init_std": 0.2, "embedding_init_std": 1.0}


def _stages(text: str) -> int | list[dict[str, str]]:
    if text == "1":
        return 1
    return [dict(item.strip().split(" ") for item in stage.split("+")) for stage in text.split("|")]


def build_topology(case: Case) -> Topology:
    """This rank's place in the case's layout."""
    config = engine_config(case)
    return Topology(rank_info(os.environ), case.tensor, torch.device("cpu"), plan=config.stage_plan)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, S]` and labels `[n, B, S]` of a step; step 1 ignores some targets of head 2."""
    generator = torch.Generator().manual_seed(step)
    window = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE + HEADS), generator=generator)
    labels = torch.stack([window[:, k : k + SEQUENCE] for k in range(1, HEADS + 1)])
    if step == 1:
        labels[1, : GLOBAL_BATCH // 2 - 1, : SEQUENCE // 2] = -100
    return window[:, :SEQUENCE], labels


def global_documents(step: int, frequency: float = 0.3) -> Tensor:
    """Numbers `[B, S]` of a step's documents, which are of any length from one token on."""
    generator = torch.Generator().manual_seed(100 + step)
    starts = torch.rand(GLOBAL_BATCH, SEQUENCE, generator=generator) < frequency
    starts[:, 0] = False
    return starts.cumsum(1, dtype=torch.int32)


def within_documents(labels: Tensor, documents: Tensor) -> Tensor:
    """Labels without the targets that lie in another document than their position."""
    labels, length = labels.clone(), documents.shape[1]
    for head in range(1, labels.shape[0] + 1):
        # past the row's end its last document may go on, and here it does
        reached = documents[:, [min(t + head, length - 1) for t in range(length)]]
        labels[head - 1][reached != documents] = -100
    return labels


def local_batches(step: int, case: Case, data_rank: int) -> list[Batch]:
    """One rank's micro-batches of a step, dealt as the loader deals them."""
    tokens, labels = global_batch(step)
    # A memory wants documents that are longer than a segment.
    frequency = 0.1 if case.memory else 0.3
    documents = global_documents(step, frequency) if case.documents else None
    if documents is not None:
        labels = within_documents(labels, documents)
    micro = GLOBAL_BATCH // (case.data_size * case.accumulation)
    starts = [(a * case.data_size + data_rank) * micro for a in range(case.accumulation)]
    return [
        Batch(
            tokens[s : s + micro],
            labels[:, s : s + micro],
            None if documents is None else documents[s : s + micro],
        )
        for s in starts
    ]


def whole(name: str, part: Tensor, topology: Topology) -> Tensor:
    """A parameter or gradient from all tensor-parallel ranks' parts; a collective."""
    placement = placement_of(name)
    if placement.dim is None or topology.tensor_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(topology.tensor_size)]
    dist.all_gather(parts, part.contiguous(), group=topology.get_tensor_model_parallel_group())
    return merge_slices(parts, placement)
