"""`data.review`: a run that goes over its data in phases, some of them over hard sequences only.

Learn, focus, review (Prakriya et al. 2024, arXiv:2409.06131).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, field_validator

from pipeline.config.problems import shown
from pipeline.config.sections import Name, PositiveInt, Section

Percent = Annotated[float, Field(ge=0, lt=100)]


class ReviewPhase(Section):
    """A phase of `data.review`: so many epochs over all sequences, or over those that are left.

    Attributes:
        name: for people, in the log and the report.
        epochs: passes over the phase's sequences; a statistic is the mean over them.
        drop_percent: share of all sequences that is left out, those of the lowest loss of head 1
            in the last phase before this one that had all; 0 = none.
        repetitions: how many times the epochs are done, over the same sequences.
    """

    name: Name
    epochs: PositiveInt = 1
    drop_percent: Percent = 0.0
    repetitions: PositiveInt = 1

    @property
    def passes(self) -> int:
        """Epochs of all repetitions."""
        return self.epochs * self.repetitions


# One epoch each but for the last, as the paper has it for GPT-2 on OpenWebText: 4 epochs' worth.
PUBLISHED_PHASES = (
    ReviewPhase(name="learn"),
    ReviewPhase(name="focus", drop_percent=50.0),
    ReviewPhase(name="review"),
    ReviewPhase(name="focus", drop_percent=70.0, repetitions=5),
)
_MOST_PASSES = 1000
_OF_REMEDY = {
    "running_mean_sequences": "subtract_running_mean",
    "rescore_percent": "rescore",
}


class ReviewSection(Section):
    """How a run reviews its data.

    Attributes:
        phases: the phases in their order, or published = those of the paper: learn, all for 1
            epoch; focus, without 50 %, for 1; review, all for 1; focus, without 70 %, for 1,
            5 times.
        sequences: go over so many of the training sequences, evenly spread; null = all of them.
        min_targets: a sequence with fewer targets of head 1 has no loss to rely on, and is among
            the first that are left out.
        staleness: what to do about losses of sequences that came early, when the model knew less:
            none = take them as they are, as published; subtract_running_mean = from each that mean
            of the losses around it; rescore = read the sequences again before a choice, forward
            only, and take those losses instead.
        running_mean_sequences: sequences over which subtract_running_mean takes its mean.
        rescore_percent: share of the sequences that rescore reads again, those that came first.
    """

    phases: Annotated[tuple[ReviewPhase, ...], Strict(False)] = PUBLISHED_PHASES
    sequences: PositiveInt | None = None
    min_targets: PositiveInt = 1
    staleness: Literal["none", "subtract_running_mean", "rescore"] = "none"
    running_mean_sequences: PositiveInt = 1024
    rescore_percent: Annotated[float, Field(gt=0, le=100)] = 100.0

    def without_effect(self) -> list[str]:
        """Settings that were given and belong to another remedy, one line each."""
        return [
            f"data.review.{key}={getattr(self, key)}: data.review.staleness={self.staleness}"
            for key, remedy in _OF_REMEDY.items()
            if key in self.model_fields_set and self.staleness != remedy
        ]

    @field_validator("phases", mode="before")
    @classmethod
    def _may_be_named(cls, phases: Any) -> Any:
        if isinstance(phases, str):
            if phases != "published":
                raise ValueError(
                    f"review.phases={shown(phases)} is not a schedule; write published, or a list "
                    "of phases with name, epochs, drop_percent and repetitions"
                )
            return PUBLISHED_PHASES
        return phases

    @field_validator("phases")
    @classmethod
    def _begin_with_all(cls, phases: tuple[ReviewPhase, ...]) -> tuple[ReviewPhase, ...]:
        if not phases or phases[0].drop_percent:
            raise ValueError(
                "review.phases must begin with a phase over all sequences, which gives their "
                "losses; let the first have drop_percent: 0"
            )
        passes = sum(phase.passes for phase in phases)
        if passes > _MOST_PASSES:
            raise ValueError(
                f"review.phases have {passes:,} epochs in all, and at most {_MOST_PASSES:,} are "
                "kept apart; lower epochs or repetitions"
            )
        return phases
