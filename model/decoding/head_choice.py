"""How many heads pay, and whether a tree of their drafts does, on this machine.

What decides is expected tokens per forward over what a forward costs. Rows that begin together go
on until the slowest one has ended, and in some texts drafts are hardly ever right: there it counts.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.decoding.chain import ChainDecoder, RowOptions
from model.decoding.tree import TreeDecoder
from model.hugging_face.acceptance import ACCEPTANCE_NAME, Acceptance, read_acceptance
from model.inference.network import Network

_PROMPT_TOKENS = 32
_ROUNDS = 4
# Another number of heads has to promise so much more than fewer do: costs are measured in a moment.
_LEAST_GAIN = 1.03
# What drafts add to the speed of rows that begin together, over what the mean row gains. In batches
# of 16 texts of benchmarks/README.md, tokens/s times ms per forward over those of one head, less 1:
# chains of greedy texts 0.04 to 0.13 (of the larger model in fp32 0.28 to 0.48), of sampled ones
# 0.54 to 0.85.
_SLOWEST = 0.25


class Drafting(NamedTuple):
    """A way of drafting with the heads.

    Attributes:
        heads: k, 1 for no drafts.
        spread: of the tree (`model.decoding.tree`); 0 = a chain.
    """

    heads: int
    spread: int


class HeadChoice(NamedTuple):
    """Heads to use, by rows in the batch.

    Attributes:
        heads: for each measured number of rows, rising; a batch takes the first one that is not
            smaller than itself, or the last.
    """

    heads: dict[int, int]

    @property
    def most(self) -> int:
        """The largest number of heads that is used."""
        return max(self.heads.values())

    def of(self, rows: int) -> int:
        """Heads for a batch of so many rows."""
        return next(
            (k for size, k in self.heads.items() if size >= rows), [*self.heads.values()][-1]
        )

    def told(self) -> str:
        """For people: heads, or heads by batch."""
        if len(set(self.heads.values())) == 1:
            return f"{self.most} {'head' if self.most == 1 else 'heads'}"
        return ", ".join(f"{k} up to {size}" for size, k in self.heads.items()) + " texts"


def automatic_heads(
    directory: Path,
    network: Network,
    sizes: Sequence[int],
    note: Callable[[str], None],
    *,
    joined: bool = False,
) -> HeadChoice:
    """Heads that pay for an export on this machine; all of them where nothing was measured.

    Args:
        directory: the export.
        network: its model.
        sizes: numbers of rows that a batch may have.
        note: told when nothing was measured.
        joined: others take the places of rows that have ended, so that the mean row counts.

    Raises:
        CheckpointError: the measured figures are damaged.
    """
    acceptance = read_acceptance(directory)
    if acceptance is None:
        note(
            f"note: {directory} has no {ACCEPTANCE_NAME}, so --heads auto takes all "
            f"{network.num_heads} heads; an export made again where the run's shards are has one"
        )
        return HeadChoice(dict.fromkeys(sizes, network.num_heads))
    return choose_heads(network, acceptance, sizes, joined=joined)


def automatic_drafting(
    directory: Path, network: Network, rows: int, note: Callable[[str], None]
) -> Drafting:
    """The chain or tree that pays for an export on this machine, for a batch of so many rows.

    Arguments and errors as of `automatic_heads`.
    """
    acceptance = read_acceptance(directory)
    if acceptance is None:
        return Drafting(automatic_heads(directory, network, [rows], note).most, 0)
    most = min(network.num_heads, len(acceptance.agreed))
    seconds = forward_seconds(network, rows, most)
    return best_drafting(
        acceptance,
        seconds,
        lambda way: forward_seconds_of(network, rows, [way])[0],
        _share(rows, joined=False),
    )


def best_drafting(
    acceptance: Acceptance,
    seconds: Sequence[float],
    measure: Callable[[Drafting], float],
    share: float = 1.0,
) -> Drafting:
    """The chain or tree with the most expected tokens per second.

    Args:
        acceptance: how often drafts are right.
        seconds: of a forward with 1, 2, .. heads in a chain.
        measure: gives those of a tree. It takes at least as long as its chain, so it is asked only
            about trees that would pay if they took no longer; the most promising first.
        share: as of `best_heads`.
    """

    def tokens(way: Drafting) -> float:
        return _tokens(acceptance, way, share)

    heads = best_heads(acceptance, seconds, share)
    best = Drafting(heads, 0)
    speed = tokens(best) / seconds[heads - 1]
    trees = [
        Drafting(k, spread)
        for k in range(2, len(seconds) + 1)
        for spread in range(1, len(acceptance.within) + 1)
    ]

    def bound(way: Drafting) -> float:
        return tokens(way) / seconds[way.heads - 1]

    for way in sorted(trees, key=bound, reverse=True):
        if bound(way) <= speed * _LEAST_GAIN:
            break
        found = tokens(way) / max(measure(way), seconds[way.heads - 1])
        if found > speed * _LEAST_GAIN:
            best, speed = way, found
    return best


def choose_heads(
    network: Network, acceptance: Acceptance, sizes: Sequence[int], *, joined: bool
) -> HeadChoice:
    """Measure forwards with 1 to n heads and choose, for each size of the batch.

    Args:
        network: the model; it has as many heads as `acceptance` speaks of, or more.
        acceptance: how often drafts are right.
        sizes: numbers of rows.
        joined: as of `automatic_heads`.
    """
    most = min(network.num_heads, len(acceptance.agreed))
    heads = {}
    for size in sorted(set(sizes)):
        costs = forward_seconds(network, size, most)
        heads[size] = best_heads(acceptance, costs, _share(size, joined=joined))
    return HeadChoice(heads)


def best_heads(acceptance: Acceptance, seconds: Sequence[float], share: float = 1.0) -> int:
    """The number of heads, from 1, with the most expected tokens per second.

    Args:
        acceptance: how often drafts are right.
        seconds: of a forward with 1, 2, .. heads.
        share: how much counts of what drafts add to a forward's one token.
    """
    best, speed = 1, 1 / seconds[0]
    for heads in range(2, len(seconds) + 1):
        found = _tokens(acceptance, Drafting(heads, 0), share) / seconds[heads - 1]
        if found > speed * _LEAST_GAIN:
            best, speed = heads, found
    return best


def _tokens(acceptance: Acceptance, way: Drafting, share: float) -> float:
    return 1 + share * (acceptance.tokens_per_forward(*way) - 1)


def _share(rows: int, *, joined: bool) -> float:
    return 1.0 if rows == 1 or joined else _SLOWEST


def forward_seconds(network: Network, rows: int, most: int) -> list[float]:
    """Seconds of a forward with 1 to `most` heads in a chain.

    More heads do more, so what seems to take less was measured badly, and counts as much as fewer.
    """
    chains = [Drafting(heads, 0) for heads in range(1, most + 1)]
    return list(itertools.accumulate(forward_seconds_of(network, rows, chains), max))


def forward_seconds_of(network: Network, rows: int, ways: Sequence[Drafting]) -> list[float]:
    """Seconds of a forward of some ways of drafting, the best of some rounds in turn."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = network.config.vocab_size
    prompts = torch.randint(vocab_size, (rows, _PROMPT_TOKENS), generator=generator).tolist()
    decoders = []
    for heads, spread in ways:
        decoder = ChainDecoder(network, heads=heads)
        if spread:
            decoder = TreeDecoder(network, heads=heads, spread=spread)
        decoder.open(rows, _PROMPT_TOKENS + (_ROUNDS + 1) * heads)
        decoder.join(prompts, [RowOptions()] * rows)
        decoder.step()  # the first one makes what is made once
        decoders.append(decoder)
    best = [float("inf")] * len(ways)
    # Of one thread the time it computes counts, on which other work has less influence.
    alone = network.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    for _ in range(_ROUNDS):
        for place, decoder in enumerate(decoders):
            start_s = clock()
            decoder.step()
            best[place] = min(best[place], clock() - start_s)
    return best
