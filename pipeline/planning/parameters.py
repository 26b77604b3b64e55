"""Parameters that a rank of a stage holds, by what happens to them."""

from typing import NamedTuple

from model.config import ModelConfig
from model.structure.freezing import Freeze, is_head_trained
from model.structure.part import ModelPart


class RankParameters(NamedTuple):
    """Elements on one tensor-parallel rank of a stage, before ZeRO divides them.

    Attributes:
        held: all that the stage computes with, but for copies.
        trained: of them.
        lm_head: final norm and unembedding, trained here or a copy; 0 without heads. When it is
            replicated, the norm and the unembeddings of the heads here.
        head_layers: of the trained layers, or linear maps, of the stage's heads.
        layer: of one layer.
        copied: `lm_head` where another stage trains it, else 0.
    """

    held: float
    trained: float
    lm_head: float
    head_layers: float
    layer: float
    copied: float


def rank_parameters(
    part: ModelPart, model: ModelConfig, tensor_size: int, *, freeze: Freeze = "none"
) -> RankParameters:
    """Elements of a rank: matrices and the unembedding are divided, norm weights are not."""
    count, hidden = model.parameter_count(), model.hidden_size
    norms = 2 * hidden
    layer = (count.trunk_layers / model.trunk_layers - norms) / tensor_size + norms
    head = model.layers_per_head * layer or hidden**2 / tensor_size
    unembedding = model.vocab_size * hidden / tensor_size
    replicated = model.lm_head == "replicated"
    further = replicated * sum(1 for number in part.heads if number > 1) * unembedding
    lm_head, owned = 0.0, 0.0
    if part.heads:
        shared = unembedding * (part.owns_lm_head or not replicated) + count.final_norm
        lm_head = shared + further
        owned = lm_head if part.owns_lm_head else further
    held = len(part.trunk_layers) * layer + len(part.heads) * head + owned
    held += part.has_embedding * (count.embedding / tensor_size + count.memory)
    trained_heads = sum(is_head_trained(number, freeze) for number in part.heads)
    trained = held if freeze == "none" else trained_heads * head + further
    if freeze == "all_but_memory":
        trained = count.memory
    return RankParameters(held, trained, lm_head, trained_heads * head, layer, lm_head - owned)


def part_parameters(part: ModelPart, model: ModelConfig) -> int:
    """Parameters trained in a stage, over all its tensor-parallel ranks."""
    return round(rank_parameters(part, model, 1).held)
