"""What is planned: a model and its step, how ranks share them, and the machine they run on."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.structure.freezing import Freeze
from model.structure.part import ModelPart

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class Machine:
    """What ranks compute and communicate with.

    Attributes:
        name: for tables.
        ranks_per_node: ranks that share a node.
        flops: FLOP/s of a rank in transformer layers.
        lm_head_flops: FLOP/s of a rank in the chunked loss.
        intra_bandwidth: bytes/s of a rank in a collective within a node.
        inter_bandwidth: bytes/s between nodes, a rank's share of its node's network.
        latency_s: of a message; a ring of n ranks passes n - 1 on.
        optimizer_s: per parameter that a rank updates.
        memory_bytes: of a rank, that may be filled.
        element_bytes: of weights and activations.
        overlaps: whether ZeRO-3's traffic goes on while a rank computes.
    """

    name: str
    ranks_per_node: int
    flops: float
    lm_head_flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    latency_s: float
    optimizer_s: float
    memory_bytes: float
    element_bytes: int = 2
    overlaps: bool = True


@dataclass(frozen=True)
class Work:
    """A model and what a step of it is.

    Attributes:
        model: sizes.
        sequence_length: S.
        chunk_tokens: tokens whose logits exist at once; by default as on a GPU.
        bucket: gradient elements that are reduced at once.
        fp32_reduction: whether gradients travel in fp32; None = from so many ranks on as
            `parallel.reduce_precision=auto` has it.
        freeze: what is not trained, as `train.freeze`.
    """

    model: ModelConfig
    sequence_length: int
    chunk_tokens: int = 4096
    bucket: int = 500_000_000
    fp32_reduction: bool | None = None
    freeze: Freeze = "none"


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Attributes:
        plan: what each stage holds.
        data: data-parallel size.
        tensor: tensor-parallel size.
        zero: ZeRO level.
        micro_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        checkpointing: which activations are computed again in backward.
        neighbors: `parallel.zero_hpz_partition_size`.
    """

    plan: tuple[ModelPart, ...]
    data: int
    tensor: int
    zero: int
    micro_size: int
    accumulation: int
    checkpointing: Checkpointing = "none"
    neighbors: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return len(self.plan) * self.data * self.tensor

    @property
    def samples(self) -> int:
        """Of a step, over all ranks."""
        return self.data * self.micro_size * self.accumulation

    def micro_tokens(self, work: Work) -> int:
        """Tokens of a micro-batch."""
        return self.micro_size * work.sequence_length


class Prediction(NamedTuple):
    """What the formulas of time give.

    Attributes:
        step_s: seconds of a step.
        idle: share of the pipeline's time that each stage waits.
    """

    step_s: float
    idle: list[float]
