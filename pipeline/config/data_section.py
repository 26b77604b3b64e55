"""The `data` section of a run configuration: shards, windows, mixture, what is skipped."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, Strict, ValidationInfo, field_validator

from pipeline.config.problems import shown
from pipeline.config.review_section import ReviewSection
from pipeline.config.sections import (
    MAX_COUNT,
    Count,
    FilePath,
    Name,
    Section,
)

Weight = Annotated[float, Field(ge=0, le=MAX_COUNT)]
BatchNumber = Annotated[int, Field(le=MAX_COUNT)]
BatchRange = Annotated[tuple[BatchNumber, BatchNumber], Strict(False)]
Split = Literal["train", "validation"]


class WeightPhase(Section):
    """Weights of the sources from a step on: after `step` steps, until the next phase.

    Attributes:
        step: steps after which these weights begin; 0 in the first one.
        weights: share of samples of each source.
    """

    step: Count
    weights: dict[Name, Weight]


class DataSection(Section):
    """Where tokens come from and how they are cut into samples.

    Attributes:
        shards: a directory that data_prep/shard.py made.
        sequence_length: input tokens of a training sequence.
        tokenizer: refuse shards of another one; null = take theirs.
        train_split: split to train on.
        eval_split: split to validate on.
        prefetch_steps: steps read ahead.
        document_mask: attention, positions and targets stay within a document.
        packing: concat = the stream is cut every sequence_length tokens; best_fit = whole
            documents are packed into sequences, and only longer ones than a sequence are cut;
            one_per_sequence = a sequence for each document, with padding.
        weights: share of samples of each source; null = the set's own, else by tokens.
        weight_schedule: weights that change during the run, as phases of step and weights.
        skip_batches: global batches never to train on, as [first, last] pairs; the first batch of
            the run is 1.
        review: go over the data in phases, some of them over hard sequences only; the number of
            steps follows from them. null = one mixture from the first step to the last.
    """

    shards: FilePath
    sequence_length: Annotated[int, Field(gt=0, lt=2**31)]
    tokenizer: FilePath | None = None
    train_split: Split = "train"
    eval_split: Split = "validation"
    prefetch_steps: Annotated[int, Field(gt=0, le=10_000)] = 2
    document_mask: bool = False
    packing: Literal["concat", "best_fit", "one_per_sequence"] = "concat"
    weights: dict[Name, Weight] | None = None
    weight_schedule: Annotated[tuple[WeightPhase, ...], Strict(False)] = ()
    skip_batches: Annotated[tuple[BatchRange, ...], Strict(False)] = ()
    review: ReviewSection | None = None

    @field_validator("weights")
    @classmethod
    def _mix_something(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and (problem := _weights_problem("weights", weights)):
            raise ValueError(problem)
        return weights

    @field_validator("weight_schedule")
    @classmethod
    def _stages_follow_each_other(
        cls, phases: tuple[WeightPhase, ...], info: ValidationInfo
    ) -> tuple[WeightPhase, ...]:
        problems = []
        if phases and info.data.get("weights") is not None:
            problems.append(
                "weight_schedule and data.weights are both given; keep one (weights is short for "
                "a schedule with the one phase of step 0)"
            )
        if phases and phases[0].step != 0:
            problems.append(
                f"weight_schedule starts at step {phases[0].step}; its first phase must have "
                "step: 0, the weights at the start of the run"
            )
        problems += [
            f"weight_schedule has step {after.step} after step {before.step}; put the phases in "
            "the order of their steps, each once"
            for before, after in pairwise(phases)
            if after.step <= before.step
        ]
        for index, phase in enumerate(phases):
            if problem := _weights_problem(f"weight_schedule[{index}].weights", phase.weights):
                problems.append(problem)
        if problems:
            raise ValueError("\n".join(problems))
        return phases

    @field_validator("skip_batches")
    @classmethod
    def _ranges_are_apart(cls, ranges: tuple[BatchRange, ...]) -> tuple[BatchRange, ...]:
        problems = [
            f"skip_batches has [{first}, {last}]; a range is [first, last] with "
            "1 <= first <= last, batch 1 being the first of the run"
            for first, last in ranges
            if not 1 <= first <= last
        ]
        problems += [
            f"skip_batches has [{before[0]}, {before[1]}] and [{after[0]}, {after[1]}], which "
            "overlap; join them into one range"
            for before, after in pairwise(sorted(ranges))
            if after[0] <= before[1]
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return ranges

    @property
    def weight_phases(self) -> tuple[WeightPhase, ...]:
        """The schedule of weights; empty when the set's own weights hold for the whole run."""
        if self.weights is not None:
            return (WeightPhase(step=0, weights=self.weights),)
        return self.weight_schedule


def _weights_problem(key: str, weights: Mapping[str, float]) -> str | None:
    if sum(weights.values()) > 0:
        return None
    return f"{key}={shown(weights)} gives no source a share; give one a weight above 0"
