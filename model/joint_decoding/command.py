"""What the command that generates text does by joint decoding."""

import argparse
from collections.abc import Sequence
from typing import Any

from model.decoding.sampling import GREEDY, Sampling
from model.inference.network import Network
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.options import rule_of


def joint_decoder(
    options: Any,
    network: Network,
    *,
    heads: int,
    drafter: Network | None,
    drafts: int,
    eos_ids: frozenset[int],
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    logprobs: bool = False,
) -> JointDecoder:
    """The decoder that options ask for.

    Args:
        options: of the command, checked, or what has attributes of the same names.
        network: the model.
        heads: how many of the model's.
        drafter: a second one; None = the heads draft.
        drafts: how many tokens it drafts.
        eos_ids: tokens that end a text.
        sampling: how tokens are chosen, in rows whose own options are not given.
        seeds: of these, one for each; 0, 1, .. unless given.
        logprobs: whether to compute them for these.
    """
    rule = rule_of(options)
    if drafter is not None:
        return JointModelDecoder(
            network,
            drafter=drafter,
            drafts=drafts,
            rule=rule,
            eos_id=eos_ids,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
        )
    return JointDecoder(
        network,
        heads=heads,
        rule=rule,
        eos_id=eos_ids,
        sampling=sampling,
        seeds=seeds,
        logprobs=logprobs,
    )


def joint_name(options: argparse.Namespace, drafter: Network | None, heads: int) -> str:
    """What is done, as it is printed."""
    beams = "1 beam" if options.beam_width == 1 else f"{options.beam_width} beams"
    drafts = f"{heads} heads" if drafter is None else f"a draft model, {options.drafts} drafts"
    return f"joint decoding (lossy), {beams} of {drafts}"


def joint_statistics(decoder: JointDecoder, forwards: int) -> list[str]:
    """Lines about what was kept, after so many forwards of the model."""
    rule = decoder.rule
    return [
        f"lossy: drafts are kept where P / Q > {rule.threshold:g}, of {rule.candidates} "
        f"{'candidate' if rule.candidates == 1 else 'candidates'}; up to "
        f"{len(decoder.tried) + 1} tokens per forward",
        f"forwards: {forwards} of the model, {decoder.draft_forwards} of the draft model",
    ]
