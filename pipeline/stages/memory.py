"""Activations and logits that a rank of each stage holds at once, in bytes.

Legend: H hidden, V vocabulary, T tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from model.config import ModelConfig
from model.structure.activation_memory import layer_activation_bytes
from model.structure.part import ModelPart
from pipeline.stages.plan import depths

_SUM_BYTES = 4  # of what the loss adds up in


class MicroBatch(NamedTuple):
    """What passes through a rank at a time.

    Attributes:
        tokens: T.
        tensor_size: tensor-parallel ranks that share it.
        element_bytes: of activations.
        checkpointing: which of them are computed again in backward.
        accumulation: micro-batches of a step.
    """

    tokens: int
    tensor_size: int
    element_bytes: int
    checkpointing: Literal["none", "full", "selective"]
    accumulation: int


def stage_activation_bytes(
    plan: Sequence[ModelPart],
    stage: int,
    model: ModelConfig,
    micro: MicroBatch,
    *,
    trunk_trained: bool = True,
) -> float:
    """Bytes kept for backward on a rank of a stage, when they are the most.

    In the first stage of a chain of D depths D micro-batches are in flight, in the next D - 1, and
    so on. Heads keep z alone, and one head's layers at a time; a layer that is recomputed has all
    of its activations while it runs backward. Heads that read one another keep what each reads, of
    every micro-batch in flight.

    Args:
        plan: what each stage holds.
        stage: which one.
        model: sizes.
        micro: the micro-batches.
        trunk_trained: False when the trunk is frozen and keeps nothing.
    """

    def layer(checkpointing: Literal["none", "full", "selective"]) -> float:
        return layer_activation_bytes(
            model,
            tokens=micro.tokens,
            checkpointing=checkpointing,
            tensor_size=micro.tensor_size,
            element_bytes=micro.element_bytes,
        )

    part, depth_of = plan[stage], depths(plan, model)
    in_flight = min(depth_of[-1] + 1 - depth_of[stage], micro.accumulation)
    kept = trunk_trained * len(part.trunk_layers) * layer(micro.checkpointing) * in_flight
    running = layer("none") if micro.checkpointing != "none" else 0.0
    if part.heads:
        running = max(running, _head_bytes(model, micro, layer))
    # z and its gradient; of a head what enters the final norm, what leaves it, and its gradient.
    streams = 2 + 3 * bool(part.heads)
    if part.heads and model.chain:
        streams += len(part.heads) * in_flight
    return kept + running + streams * micro.tokens * model.hidden_size * micro.element_bytes


def _head_bytes(
    model: ModelConfig,
    micro: MicroBatch,
    layer: Callable[[Literal["none", "full", "selective"]], float],
) -> float:
    """Bytes of the one head that runs: its layers as checkpointing leaves them, one of them whole.

    Chains of heads do not recompute within a head. A linear head keeps its input, which is z, and
    what it gives is counted with the norm's streams.
    """
    layers = model.layers_per_head
    if not layers:
        return 0.0
    kept = micro.checkpointing if layers > 1 else "none"
    if model.chain and kept == "full":
        kept = "none"
    return (layers - 1) * layer(kept) + layer("none")


def loss_bytes(model: ModelConfig, micro: MicroBatch, chunk_tokens: int) -> float:
    """Bytes of a chunk's logits and their gradient on a rank with heads."""
    logits = min(chunk_tokens, micro.tokens) * model.vocab_size / micro.tensor_size
    # Logits in the activations' precision become exponentials in fp32, in place where it is theirs.
    return logits * (_SUM_BYTES + (micro.element_bytes if micro.element_bytes < _SUM_BYTES else 0))
