"""A model whose extra heads are always right, to see blocks that are accepted as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder
from model.inference.cache import Block, Cache
from model.inference.network import Network
from tests.support.tiny_model import tiny_config, tiny_weights

_FIRST, _SECOND = 0, 1  # places of the code in a hidden state


class PerfectDrafts(Network):
    """Head 1 of a real model; heads 2 .. n spell what head 1 is known to say later.

    Their hidden states are codes that `logits` understands.

    Args:
        network: the real model.
        texts: prompt and greedy continuation of each row; drafts past their ends are token 0.
    """

    def __init__(self, network: Network, texts: Sequence[Sequence[int]]) -> None:
        super().__init__(network.config, network.weights)
        self.texts = list(texts)

    def heads(
        self, trunk_output: Tensor, first: int, last: int, cache: Cache, block: Block
    ) -> Tensor:
        """Head 1 computed, the others looked up."""
        hidden = super().heads(trunk_output, first, last, cache, block)
        for index, slot in enumerate(block.slots.tolist()):
            row, place = divmod(slot, cache.capacity)
            for head in range(max(first, 2), last + 1):
                text = self.texts[row]
                at = place + head
                hidden[head - first, index, _FIRST] = torch.nan
                hidden[head - first, index, _SECOND] = text[at] if at < len(text) else 0
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Of a code, all on its token."""
        coded = hidden[..., _FIRST].isnan()
        logits = super().logits(hidden.nan_to_num())
        tokens = hidden[..., _SECOND].long().clamp(0, logits.shape[-1] - 1)
        spelled = torch.nn.functional.one_hot(tokens, logits.shape[-1]).to(logits.dtype)
        return torch.where(coded.unsqueeze(-1), spelled, logits)


class PerfectChain(ChainDecoder):
    """A chain of such drafts; it knows which row is which when rows leave."""

    network: PerfectDrafts

    def keep(self, order: Sequence[int]) -> None:
        """The texts follow their rows."""
        self.network.texts = [self.network.texts[row] for row in order]
        super().keep(order)


def copies_of_head_1() -> dict[str, Tensor]:
    """Weights of a tiny model whose heads are all alike: plausible drafts for the wrong place."""
    weights = tiny_weights(tiny_config())
    for name in list(weights):
        for head in "234":
            copied = name.replace("heads.layers.1.", f"heads.layers.{head}.")
            weights[copied] = weights[name]
    return weights
