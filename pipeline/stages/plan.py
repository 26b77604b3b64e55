"""Pipeline stages: which layers and heads each holds, how balanced that is, how long it idles.

A stage's weight is counted in layer-equivalents: a trunk layer is 1, a head of one layer 1 + u,
where u is the unembedding's product in units of a layer's (its matrix elements over a layer's). The
embedding is a look-up and weighs nothing.

Stages hold heads in the order in which they are computed: of anticausal ones the last heads first.
Linear heads stay together. DeepSpeed reduces the norm of one parameter group after the other over
all stages, so each needs a weight that decays and one that does not, and they have none.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from foundation.shown_text import printable
from model.config import MAX_LAYERS, ModelConfig
from model.structure.part import ModelPart, span_text

# What parallel.stages may hold: a number, `auto:S`, or one mapping per stage.
StagesSetting = int | str | tuple[Mapping[str, int | str], ...]

MAX_STAGES = 128
# Numbers that int() takes whole; whether they fit the model is another question.
_AUTO = re.compile(r"auto:([1-9][0-9]{0,8})")
_SPAN = re.compile(r"([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?")
_SHOWN, _SHOWN_NUMBERS, _SHOWN_PLAN = 60, 8, 400
_KINDS = ("trunk", "heads")
_EXAMPLE = "[trunk: 0-13, trunk: 14-27, heads: 1-2, heads: 3-4]"
# Heads get stages of their own unless sharing a stage with trunk layers makes the slowest stage
# faster by more than this: a stage of heads keeps no activations while micro-batches are in flight.
_WORTH_SHARING = 0.25


def setting_problem(stages: StagesSetting) -> str | None:
    """What is wrong with the form of `parallel.stages`, before any model is looked at."""
    remedy = f"write auto:4, or a list such as {_EXAMPLE}"
    if isinstance(stages, int):
        return None if stages > 0 else f"stages={stages} must be at least 1; {remedy}"
    if isinstance(stages, str):
        if _AUTO.fullmatch(stages):
            return None
        return f"stages={printable(repr(stages), _SHOWN)} is not a plan; {remedy}"
    if not stages:
        return f"stages=[] has no stage; {remedy}"
    for number, stage in enumerate(stages):
        for kind, span in stage.items():
            if kind not in _KINDS:
                given = printable(repr(kind), _SHOWN)
                return f"stages: stage {number} holds {given}, known are trunk and heads; {remedy}"
            match, given = _SPAN.fullmatch(str(span).strip()), printable(str(span), _SHOWN)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                return (
                    f"stages: stage {number} has {kind}: {given}, which is not a number or a "
                    f"rising span such as 0-13; {remedy}"
                )
            if int(match[2] or match[1]) > MAX_LAYERS:
                return (
                    f"stages: stage {number} has {kind}: {given}, past the {MAX_LAYERS} layers "
                    f"that a model may have; {remedy}"
                )
        if not stage:
            return f"stages: stage {number} is empty; {remedy}"
    return None


def num_stages(stages: StagesSetting) -> int:
    """How many stages a well-formed `parallel.stages` asks for."""
    if isinstance(stages, int):
        return stages
    return int(stages.removeprefix("auto:")) if isinstance(stages, str) else len(stages)


def plan_problems(stages: StagesSetting, model: ModelConfig) -> list[str]:
    """Why the stages do not hold the model, one line each with a plan that does; else empty."""
    count = num_stages(stages)
    if count > (most := model.trunk_layers + len(_head_runs(model))):
        return [
            f"parallel.stages={count} is more than the {most} that this model can fill, since each "
            f"stage needs a trunk layer or {'the' if model.head_kind == 'linear' else 'a'} "
            f"head{'s' * (model.head_kind == 'linear')}; use at most auto:{most}"
        ]
    if count > MAX_STAGES:
        return [
            f"parallel.stages={count} is more than the {MAX_STAGES} stages that a run may have; "
            f"use at most auto:{MAX_STAGES}"
        ]
    if isinstance(stages, int | str):
        return []
    parts = _listed(stages)
    problems = [
        *_coverage("trunk layers", [p.trunk_layers for p in parts], range(model.trunk_layers)),
        *_coverage("heads", [_in_order(p.heads, model) for p in parts], model.head_order),
    ]
    for number, (part, following) in enumerate(pairwise(parts)):
        if part.heads and following.trunk_layers:
            problems.append(
                f"stage {number + 1} has trunk layers below heads of stage {number}, but heads "
                "read what the whole trunk gives"
            )
    if model.head_kind == "linear" and sum(1 for part in parts if part.heads) > 1:
        problems.append("linear heads must be in one stage, together")
    balanced = plan_text(balanced_plan(count, model))
    given = printable(plan_text(parts), _SHOWN_PLAN)
    return [
        f"parallel.stages={given}: {problem}; the balanced plan is "
        f"{printable(balanced, _SHOWN_PLAN)}"
        for problem in problems
    ]


def stage_plan(stages: StagesSetting, model: ModelConfig) -> tuple[ModelPart, ...]:
    """The part of the model that each stage holds, first stage first.

    `stages` has neither `setting_problem` nor `plan_problems`.
    """
    if isinstance(stages, int | str):
        return balanced_plan(num_stages(stages), model)
    return tuple(_listed(stages))


def plan_text(plan: Sequence[ModelPart]) -> str:
    """A plan as it is written in a configuration."""
    stages = []
    for part in plan:
        items = [("trunk", part.trunk_layers), ("heads", part.heads)]
        text = ", ".join(f"{kind}: {span_text(numbers)}" for kind, numbers in items if numbers)
        stages.append(f"{{{text}}}" if part.trunk_layers and part.heads else text)
    return f"[{', '.join(stages)}]"


def layer_equivalents(part: ModelPart, model: ModelConfig) -> float:
    """A stage's weight: 1 per trunk layer, 1 + u per head of one layer."""
    return len(part.trunk_layers) + len(part.heads) * model.head_layer_equivalents


@lru_cache(maxsize=8)
def balanced_plan(count: int, model: ModelConfig) -> tuple[ModelPart, ...]:
    """The plan of `count` stages whose heaviest stage is lightest.

    The heads get stages of their own, after the trunk's, unless a stage that holds trunk layers
    and heads makes the heaviest stage a quarter lighter (few stages under a deep trunk).

    Example: 28 trunk layers and 4 heads with u = 0.65 on 5 stages: 4 x 7 layers, and 6.6.
    """
    trunk, heads = model.trunk_layers, len(_head_runs(model))
    if count == 1:
        return (ModelPart.whole(model),)
    plans = [
        _separate(model, head_stages, count)
        for head_stages in range(1, min(heads, count - 1) + 1)
        if count - head_stages <= trunk
    ]

    def heaviest(plan: tuple[ModelPart, ...]) -> float:
        return max(layer_equivalents(part, model) for part in plan)

    shared = packed_plan(count, model)
    best = min(plans, key=heaviest, default=shared)
    return shared if heaviest(shared) < (1 - _WORTH_SHARING) * heaviest(best) else best


def _separate(model: ModelConfig, head_stages: int, count: int) -> tuple[ModelPart, ...]:
    none = range(0)
    trunks = _even_spans(0, model.trunk_layers, count - head_stages)
    heads = _even_spans(0, len(_head_runs(model)), head_stages)
    return (
        *(ModelPart(span, none) for span in trunks),
        *(ModelPart(none, _heads_at(span, model)) for span in heads),
    )


def _head_runs(model: ModelConfig) -> list[range]:
    """Heads that can be in stages of their own, in the order of computing; rising within a run."""
    if model.head_kind == "linear":
        return [model.head_order]
    return [range(head, head + 1) for head in model.head_order]


def _heads_at(places: range, model: ModelConfig) -> range:
    """The heads of the runs at these places, from 0; as a part names them."""
    runs = _head_runs(model)[places.start : places.stop]
    if not runs:
        return range(0)
    return range(min(run.start for run in runs), max(run.stop for run in runs))


def _in_order(heads: range, model: ModelConfig) -> range:
    """A part's heads as they are computed."""
    return heads if model.head_order.step > 0 else heads[::-1]


def _even_spans(start: int, items: int, parts: int) -> list[range]:
    """Cut items start .. start + items - 1 evenly; later parts get what is left over.

    Earlier stages hold more micro-batches in flight, so the smaller shares are theirs.
    """
    cuts = [start + items * part // parts for part in range(parts + 1)]
    return [range(first, stop) for first, stop in pairwise(cuts)]


def packed_plan(count: int, model: ModelConfig) -> tuple[ModelPart, ...]:
    """The plan whose heaviest stage is lightest when trunk layers and heads may share a stage.

    By dynamic programming over the trunk layers and the heads in one row.
    """
    trunk, runs = model.trunk_layers, _head_runs(model)
    weights = [1.0] * trunk + [len(run) * model.head_layer_equivalents for run in runs]
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[i] = (heaviest stage, cuts) of the first i items in the stages so far.
    best: list[tuple[float, tuple[int, ...]]] = [
        (total, (0, items)) for items, total in enumerate(sums)
    ]
    for stage in range(1, count):
        longer = list(best)
        for stop in range(stage + 1, len(sums)):
            longer[stop] = _last_cut(best, sums, stage, stop)
        best = longer
    cuts = best[-1][1]
    return tuple(
        ModelPart(
            range(min(first, trunk), min(stop, trunk)),
            _heads_at(range(max(first - trunk, 0), max(stop - trunk, 0)), model),
        )
        for first, stop in pairwise(cuts)
    )


def _last_cut(
    best: Sequence[tuple[float, tuple[int, ...]]], sums: Sequence[float], stage: int, stop: int
) -> tuple[float, tuple[int, ...]]:
    """The best plan of the first `stop` items whose last stage, number `stage`, begins at a cut."""
    cut = stop - 1
    heaviest, cuts = max(best[cut][0], sums[stop] - sums[cut]), best[cut][1]
    for cut in range(stop - 2, stage - 1, -1):
        last = sums[stop] - sums[cut]
        if last > heaviest:
            break  # as is the last stage of every earlier cut
        weight = max(best[cut][0], last)
        if weight < heaviest or (weight == heaviest and best[cut][1] < cuts):
            heaviest, cuts = weight, best[cut][1]
    return heaviest, (*cuts, stop)


def _listed(stages: Sequence[Mapping[str, int | str]]) -> list[ModelPart]:
    return [
        ModelPart(*(_span(stage[kind]) if kind in stage else range(0) for kind in _KINDS))
        for stage in stages
    ]


def _span(text: int | str) -> range:
    match = _SPAN.fullmatch(str(text).strip())
    assert match is not None, text
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def _coverage(what: str, spans: Sequence[range], wanted: range) -> list[str]:
    """Whether the spans hold every number once and in order."""
    held = [number for span in spans for number in span]
    counts = Counter(held)
    missing = sorted(set(wanted) - set(held))
    unknown = sorted(set(held) - set(wanted))
    twice = sorted(number for number, count in counts.items() if count > 1)
    problems = [
        f"{what} {_numbers_text(numbers)} {fault}"
        for numbers, fault in (
            (missing, "are in no stage"),
            (unknown, f"do not exist (there are {min(wanted)} to {max(wanted)})"),
            (twice, "are in two stages"),
        )
        if numbers
    ]
    if not problems and held != list(wanted):
        direction = "rising" if wanted.step > 0 else "falling"
        problems.append(f"{what} are not in {direction} order over the stages")
    return problems


def _numbers_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_NUMBERS]))
    more = len(numbers) - _SHOWN_NUMBERS
    return f"{shown} and {more} more" if more > 0 else shown


def depths(plan: Sequence[ModelPart], model: ModelConfig) -> list[int]:
    """Each stage's depth in the chain of computing: stages of heads only share the last one.

    A head stage hands the trunk's output on before it computes, so all of them work on the same
    micro-batch at the same time and need no further micro-batches in flight. Where heads read one
    another, each stage waits for the one before it.
    """
    if model.chain:
        return list(range(len(plan)))
    trunk_stages = sum(1 for part in plan if part.trunk_layers)
    return [min(stage, trunk_stages) for stage in range(len(plan))]


def num_depths(plan: Sequence[ModelPart], model: ModelConfig) -> int:
    """Length of the chain, which bounds the micro-batches in flight."""
    return depths(plan, model)[-1] + 1
