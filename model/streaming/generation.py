"""Continues texts with a model that has a memory: one token a forward, by head 1.

Greedy-exact at temperature 0, else distribution-exact. Memory does not grow with the text.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from model.decoding.batch import Piece
from model.decoding.sampling import RowSampling, RowUniforms, Sampling, draw
from model.decoding.stopping import Ending, StopStrings
from model.inference.memory_stream import MemoryState, MemoryStream
from model.inference.network import Network


def continued(
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: Collection[int],
    stop: StopStrings | None,
    sampling: Sampling,
    seeds: Sequence[int],
    state: MemoryState | None = None,
    finished: Callable[[MemoryState], None] | None = None,
) -> Iterator[Piece]:
    """Continue one prompt after the other, giving tokens as they come.

    Args:
        network: of a model with a memory.
        prompts: token ids, at least one in each prompt.
        max_new_tokens: limit for each prompt, at least 1.
        eos_id: tokens that end a text.
        stop: ends a text with the token that completes one of its strings.
        sampling: how tokens are chosen.
        seeds: one for each prompt.
        state: of a stream that every prompt goes on with; None = the prompt begins one.
        finished: told what each text has left behind; its last token is not read.
    """
    forward = 0
    for row, prompt in enumerate(prompts):
        text = MemoryStream(network, state=state)
        chooser = _Chooser(network, sampling, seeds[row], prompt)
        ending = Ending(max_new_tokens, eos_id, stop)
        read: Sequence[int] = prompt
        while not ending.ended:
            token = chooser.choose(text.last(read))
            forward += 1
            ending.take([token])
            yield Piece(row, [token], None, forward, None, ending.ended, ending.at_limit)
            read = [token]
        if finished is not None:
            finished(text.state)


class _Chooser:
    """Chooses the tokens of one text."""

    def __init__(
        self, network: Network, sampling: Sampling, seed: int, prompt: Sequence[int]
    ) -> None:
        device, vocabulary = network.device, network.config.vocab_size
        self._sampling = RowSampling([sampling], device)
        self._uniforms = RowUniforms([seed], device)
        self._seen = torch.zeros(1, 1, vocabulary, dtype=torch.bool, device=device)
        self._seen[..., list(prompt)] = True

    def choose(self, logits: Tensor) -> int:
        """The next token, from logits `[1, V]` of head 1."""
        logits = logits.unsqueeze(0)
        if self._sampling.penalized:
            logits = self._sampling.penalized_logits(logits, self._seen)
        if self._sampling.greedy:
            token = int(logits.argmax())
        else:
            chances = self._sampling.chosen_from(logits).squeeze(1)
            token = int(draw(chances, self._uniforms.next(1).squeeze(1)))
        self._seen[..., token] = True
        return token
