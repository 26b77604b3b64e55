"""Parameters that a rank of a stage holds, by what happens to them."""

from typing import NamedTuple

from model.config import ModelConfig
from model.part import ModelPart


class RankParameters(NamedTuple):
    """Elements on one tensor-parallel rank of a stage, before ZeRO divides them.

    Attributes:
        held: all that the stage computes with, but for copies.
        trained: of them.
        lm_head: final norm and unembedding, trained here or a copy; 0 without heads.
        head_layers: of the trained layers of the stage's heads.
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
    part: ModelPart, model: ModelConfig, tensor_size: int, *, freeze_trunk: bool = False
) -> RankParameters:
    """Elements of a rank: matrices and the unembedding are divided, norm weights are not."""
    count, hidden = model.parameter_count(), model.hidden_size
    norms = 2 * hidden
    layer = (count.head_layers / model.future_tokens - norms) / tensor_size + norms
    lm_head = count.unembedding / tensor_size + count.final_norm if part.heads else 0.0
    owned = lm_head if part.owns_lm_head else 0.0
    layers = len(part.trunk_layers) + len(part.heads)
    held = layers * layer + part.has_embedding * count.embedding / tensor_size + owned
    trained_heads = sum(1 for head in part.heads if head > 1 or not freeze_trunk)
    trained = trained_heads * layer if freeze_trunk else held
    return RankParameters(held, trained, lm_head, trained_heads * layer, layer, lm_head - owned)


def part_parameters(part: ModelPart, model: ModelConfig) -> int:
    """Parameters trained in a stage, over all its tensor-parallel ranks."""
    return round(rank_parameters(part, model, 1).held)
