"""What the command that generates text does with beams."""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from model.beams.hypotheses import BeamSettings
from model.beams.options import DRAFTED
from model.beams.search import BeamDecoder, BeamGeneration
from model.beams.speculative import SpeculativeDecoder, SpeculativeGeneration
from model.beams.speculative_text import Speculation
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
    generation: BeamGeneration | SpeculativeGeneration
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
        lines = [
            f"mean logarithmic probability of a token, by head 1: "
            f"{sum(logprobs) / len(logprobs):.4f}",
            f"{layers} layers of {widths / layers:.2f} beams, widths up to "
            f"{max(map(max, found.widths))}; {found.layers_per_forward:.2f} layers per forward",
            "beams at the end: " + " ".join(str(len(beams)) for beams in found.ranked),
        ]
        if isinstance(found, SpeculativeGeneration):
            lines.append(f"forwards of the draft model: {found.draft_forwards}")
            for depth, (tried, kept) in enumerate(zip(found.tried, found.kept, strict=True), 1):
                share = f"{kept / tried:.0%}" if tried else "-"
                lines.append(f"drafts of layer {depth}: kept {kept} of {tried} ({share})")
        return lines


def beam_decoder(
    options: Any,
    network: Network,
    prompts: Sequence[Sequence[int]],
    settings: BeamSettings,
    seeds: Sequence[int],
    *,
    drafts: int,
    drafter: Network | None = None,
) -> BeamDecoder | SpeculativeDecoder:
    """What continues prompts by beams as options say.

    Args:
        options: of the command, checked, or what has attributes of the same names.
        network: the model.
        prompts: token ids, at least one in each prompt.
        settings: of every text, see `beam_settings`.
        seeds: one for each prompt.
        drafts: layers that are drafted in a round, if anybody drafts.
        drafter: a second model that does; None = the model's own heads do.
    """
    if options.decoder != DRAFTED:
        return BeamDecoder(network, prompts, settings, seeds)
    speculation = Speculation(drafts, options.width_threshold, options.min_width, options.one_beam)
    return SpeculativeDecoder(network, prompts, settings, speculation, drafter, seeds)


def beam_settings(
    options: Any,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: frozenset[int],
    stop: StopStrings | None,
) -> BeamSettings:
    """How beams grow and end; options as of `beam_decoder`, the others as of `BeamSettings`."""
    return BeamSettings(
        options.beam_width,
        max_new_tokens,
        sampling,
        options.distinct_beams,
        options.length_penalty,
        eos_ids,
        stop,
    )


def run_beams(
    options: argparse.Namespace,
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    eos_ids: frozenset[int],
    stop: StopStrings | None,
    seeds: Sequence[int],
    drafter: Network | None = None,
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
        drafter: a second model that drafts; None = the model's own heads do, if anybody.
    """
    settings = beam_settings(options, options.max_new_tokens, sampling, eos_ids, stop)
    drafts = options.drafts
    if drafter is None:
        drafts = (options.heads or network.num_heads) - 1
    name = "1 beam" if options.beam_width == 1 else f"{options.beam_width} beams"
    if options.decoder == DRAFTED:
        name += ", drafted by heads" if drafter is None else ", drafted by a draft model"
    elif not sampling.greedy:
        name += ", drawn"
    start = time.perf_counter()
    decoder = beam_decoder(
        options, network, prompts, settings, seeds, drafts=drafts, drafter=drafter
    )
    while decoder.going:
        decoder.round()
    return BeamRun(name, decoder.generation(), time.perf_counter() - start)
