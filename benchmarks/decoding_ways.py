"""Every way of decoding that `decoding_quality.py` compares, on the same prompts."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.beams.hypotheses import Beam, BeamSettings
from model.beams.search import beam_search
from model.beams.speculative import speculative_beams
from model.beams.speculative_text import Speculation
from model.decoding.chain import ChainDecoder
from model.decoding.draft_model import DraftModelDecoder
from model.decoding.generation import collect, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.network import Network
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.enumeration import ExactJointDecoder
from model.joint_decoding.rule import JointRule

SAMPLED = Sampling(temperature=1.0)
DRAFTS = 3
_ENUMERATED = 512


class Texts(NamedTuple):
    """What a way of decoding gave.

    Attributes:
        tokens: new ones of each text.
        logprobs: of each, by head 1.
        forwards: of the model.
        draft_forwards: of a second one.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    forwards: int
    draft_forwards: int


class Task(NamedTuple):
    """What every way has to do.

    Attributes:
        export: of the model.
        network: the model.
        drafter: a second one.
        prompts: token ids.
        eos_ids: tokens that end a text.
        new_tokens: of each text, at most.
    """

    export: Path
    network: Network
    drafter: Network | None
    prompts: list[list[int]]
    eos_ids: frozenset[int]
    new_tokens: int

    @property
    def heads(self) -> int:
        """How many of the model's are used, where they draft."""
        return min(DRAFTS + 1, self.network.num_heads)

    def beams(self, width: int, sampling: Sampling, *, distinct: bool = False) -> BeamSettings:
        """Of so many beams."""
        return BeamSettings(width, self.new_tokens, sampling, distinct, eos_ids=self.eos_ids)


class Way(NamedTuple):
    """A way of decoding: its name, its class, and what it does."""

    name: str
    kind: str
    run: Callable[[Task], Texts]


def ways(*, drafter: bool, vocab_size: int) -> list[Way]:
    """All of them; with a second model also those that it drafts for.

    Blocks are enumerated of small vocabularies alone: each takes a forward of V rows.
    """
    found = [
        Way("greedy", "greedy-exact", lambda task: _chain(task, 1, GREEDY)),
        Way("self-speculation", "greedy-exact", lambda task: _chain(task, None, GREEDY)),
        Way("sampling", "exact", lambda task: _chain(task, 1, SAMPLED)),
        Way("speculative sampling, heads", "exact", lambda task: _chain(task, None, SAMPLED)),
        *(_searched(width) for width in (2, 4)),
        *(_searched_by_transformers(width) for width in (2, 4)),
        *(_drawn(width, distinct) for distinct in (False, True) for width in (2, 4)),
        *(_drafted(width, t, "heads") for width in (2, 4) for t in (0.5, 0.9)),
        *(_drafted(width, 1, "heads", least=width) for width in (2, 4)),
        *_every_joint("heads"),
    ]
    if vocab_size <= _ENUMERATED:
        found.append(Way("likeliest blocks of 2", "MJGD", _blocks))
    if drafter:
        found += [
            Way("speculative sampling, draft model", "exact", _draft_model),
            *(_drafted(width, t, "draft model") for width in (2, 4) for t in (0.5, 0.9)),
            *(_drafted(width, 1, "draft model", least=width) for width in (2, 4)),
            _drafted(4, 0.9, "draft model", one_beam=True),
            *_every_joint("draft model"),
        ]
    return found


def _searched(width: int) -> Way:
    return Way(
        f"beam search, W {width}",
        "beam search",
        lambda task: _of_beams(task, width, GREEDY, distinct=False),
    )


def _searched_by_transformers(width: int) -> Way:
    return Way(
        f"beam search of transformers, W {width}",
        "beam search",
        lambda task: _by_transformers(task, width),
    )


@functools.cache
def _llama(export: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(export)
    return model.eval()


@torch.inference_mode()
def _by_transformers(task: Task, width: int) -> Texts:
    model, longest = _llama(task.export), max(map(len, task.prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in task.prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in task.prompts]
    found = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(seen),
        num_beams=width,
        do_sample=False,
        max_new_tokens=task.new_tokens,
        eos_token_id=sorted(task.eos_ids),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    each = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    counts = (found.beam_indices >= 0).sum(1).tolist()
    tokens = [ids[longest:][:n].tolist() for ids, n in zip(found.sequences, counts, strict=True)]
    logprobs = [row[:n].tolist() for row, n in zip(each, counts, strict=True)]
    return Texts(tokens, logprobs, len(found.scores), 0)


def _drawn(width: int, distinct: bool) -> Way:
    name = "distinct beam sampling" if distinct else "beam sampling"
    return Way(
        f"{name}, W {width}",
        "p_beam",
        lambda task: _of_beams(task, width, SAMPLED, distinct=distinct),
    )


def _of_beams(task: Task, width: int, sampling: Sampling, *, distinct: bool) -> Texts:
    settings = task.beams(width, sampling, distinct=distinct)
    found = beam_search(task.network, task.prompts, settings)
    return Texts(found.tokens, _logprobs(found.ranked), found.forwards, 0)


def _drafted(
    width: int, threshold: float, by: str, *, least: int = 1, one_beam: bool = False
) -> Way:
    def run(task: Task) -> Texts:
        drafter = task.drafter if by == "draft model" else None
        drafts = task.heads - 1 if drafter is None else DRAFTS
        speculation = Speculation(drafts, threshold, least, one_beam)
        found = speculative_beams(
            task.network, task.prompts, task.beams(width, SAMPLED), speculation, drafter=drafter
        )
        return Texts(found.tokens, _logprobs(found.ranked), found.forwards, found.draft_forwards)

    wide = f"t {threshold:g}" if least < width else "all layers"
    name = f"DSBD, W {width}, {wide}, {by}" + (", one beam" if one_beam else "")
    return Way(name, "lossy" if one_beam else "p_beam", run)


def _every_joint(by: str) -> list[Way]:
    greedy = [_joint(JointRule(threshold=tau), by) for tau in (0.1, 0.5, 0.9)]
    several = _joint(JointRule(candidates=4), by)
    return [*greedy, several, _joint(JointRule(), by, SAMPLED)]


def _joint(rule: JointRule, by: str, sampling: Sampling = GREEDY) -> Way:
    def run(task: Task) -> Texts:
        return _drafted_jointly(task, rule, by, sampling)

    name = f"{'MTAD' if rule.candidates == 1 else 'MMTAD'}, tau {rule.threshold:g}, {by}"
    return Way(name if sampling.greedy else f"{name}, drawn", "lossy", run)


def _drafted_jointly(task: Task, rule: JointRule, by: str, sampling: Sampling) -> Texts:
    network, drafter, eos_ids = task.network, task.drafter, task.eos_ids
    if by == "draft model" and drafter is not None:
        decoder: JointDecoder = JointModelDecoder(
            network,
            drafter=drafter,
            drafts=DRAFTS,
            rule=rule,
            eos_id=eos_ids,
            sampling=sampling,
            logprobs=True,
        )
    else:
        decoder = JointDecoder(
            network,
            heads=task.heads,
            rule=rule,
            eos_id=eos_ids,
            sampling=sampling,
            logprobs=True,
        )
    texts = _streamed(task, decoder)
    return texts._replace(draft_forwards=decoder.draft_forwards)


def _blocks(task: Task) -> Texts:
    decoder = ExactJointDecoder(task.network, block=2, eos_id=task.eos_ids, logprobs=True)
    texts = _streamed(task, decoder)
    return texts._replace(forwards=2 * texts.forwards + 1)  # one read the prompts


def _chain(task: Task, heads: int | None, sampling: Sampling) -> Texts:
    heads = task.heads if heads is None else heads
    decoder = ChainDecoder(task.network, heads=heads, sampling=sampling, logprobs=True)
    return _streamed(task, decoder)


def _draft_model(task: Task) -> Texts:
    assert task.drafter is not None
    decoder = DraftModelDecoder(
        task.network, drafter=task.drafter, drafts=DRAFTS, sampling=SAMPLED, logprobs=True
    )
    texts = _streamed(task, decoder)
    return texts._replace(draft_forwards=1 + DRAFTS * texts.forwards)


def _streamed(task: Task, decoder: ChainDecoder) -> Texts:
    pieces = stream(decoder, task.prompts, max_new_tokens=task.new_tokens, eos_id=task.eos_ids)
    found = collect(pieces, len(task.prompts))
    assert found.logprobs is not None
    return Texts(found.tokens, found.logprobs, found.forwards, 0)


def _logprobs(ranked: Sequence[Sequence[Beam]]) -> list[list[float]]:
    return [list(beams[0].logprobs) for beams in ranked]
