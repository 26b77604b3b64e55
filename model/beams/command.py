"""What the command that generates text does with beams."""

import argparse
import time
from collections.abc import Sequence
from typing import NamedTuple

from model.beams.hypotheses import BeamSettings
from model.beams.search import BeamGeneration, beam_search
from model.decoding.sampling import Sampling
from model.decoding.stopping import StopStrings
from model.inference.network import Network


class BeamRun(NamedTuple):
    """One timed generation.

    Attributes:
        name: of what was done.
        generation: what came out.
        seconds: that it took.
    """

    name: str
    generation: BeamGeneration
    seconds: float

    def summary(self) -> str:
        """One line of counts, of the best beams."""
        found, count = self.generation, sum(map(len, self.generation.tokens))
        return (
            f"{self.name}: {count} tokens, {found.forwards} forwards, "
            f"{count / self.seconds:.1f} tokens/s"
        )

    def statistics(self) -> list[str]:
        """Lines about the best beams, and about layers and their widths."""
        found = self.generation
        layers, widths = sum(map(len, found.widths)), sum(map(sum, found.widths))
        best = [beams[0] for beams in found.ranked]
        logprobs = [logprob for beam in best for logprob in beam.logprobs]
        return [
            f"mean logarithmic probability of a token, by head 1: "
            f"{sum(logprobs) / len(logprobs):.4f}",
            f"{layers} layers of {widths / layers:.2f} beams, "
            f"{max(map(len, found.widths)) / found.forwards:.2f} layers per forward",
            "beams at the end: " + " ".join(str(len(beams)) for beams in found.ranked),
        ]


def run_beams(
    options: argparse.Namespace,
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    eos_ids: frozenset[int],
    stop: StopStrings | None,
    seeds: Sequence[int],
) -> BeamRun:
    """Continue prompts as the command's options say.

    Args:
        options: of the command, checked.
        network: the model.
        prompts: token ids, at least one in each prompt.
        sampling: how beams are chosen.
        eos_ids: tokens that end a beam.
        stop: ends a beam where one of its strings appears.
        seeds: one for each prompt.
    """
    settings = BeamSettings(
        options.beam_width,
        options.max_new_tokens,
        sampling,
        options.distinct_beams,
        options.length_penalty,
        eos_ids,
        stop,
    )
    start = time.perf_counter()
    found = beam_search(network, prompts, settings, seeds)
    seconds = time.perf_counter() - start
    beams = "1 beam" if options.beam_width == 1 else f"{options.beam_width} beams"
    return BeamRun(beams if sampling.greedy else f"{beams}, drawn", found, seconds)
