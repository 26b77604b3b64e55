"""The passes and steps that `data.review` comes to, given how many sequences there are."""

from fractions import Fraction
from math import ceil

from pydantic import ValidationError

from data_prep.errors import DataError
from data_prep.loading.review_order import Pass, ReviewOrder
from data_prep.loading.sequences import cut_sequences
from data_prep.shards.shard_set import ShardSet
from model.errors import ConfigError
from pipeline.config.problems import listed, plain_problems
from pipeline.config.review_section import ReviewPhase, ReviewSection
from pipeline.config.rules import problems_between
from pipeline.config.run_config import RunConfig, known_keys
from pipeline.config.sections import TrainSection
from pipeline.data.sequence_format import sequence_format


class ReviewSchedule:
    """What each phase has.

    Args:
        review: the phases.
        sequences: training sequences of all sources.

    Attributes:
        phases: as configured.
        sequences: those that the run goes over.
        passes: epochs of all phases and repetitions, in their order.
    """

    def __init__(self, review: ReviewSection, sequences: int) -> None:
        self._review = review
        self.phases = review.phases
        self.sequences = sequences = min(sequences, review.sequences or sequences)
        passes: list[Pass] = []
        for number, phase in enumerate(self.phases):
            size = sequences - dropped_by(phase, sequences)
            for place in range(phase.passes):
                repetition, epoch = divmod(place, phase.epochs)
                first = passes[-1].end if passes else 0
                chosen = phase.drop_percent > 0
                passes.append(Pass(len(passes), number, repetition, epoch, first, size, chosen))
        self.passes = tuple(passes)

    def order(self, counts: list[int], fingerprint: str, seed: int) -> ReviewOrder:
        """The order of the run's samples."""
        return ReviewOrder(self.passes, self.sequences, counts, fingerprint, seed=seed)

    def dropped(self, phase: int) -> int:
        """Sequences that a phase leaves out."""
        return dropped_by(self.phases[phase], self.sequences)

    def judges(self, phase: int) -> list[Pass]:
        """The passes whose losses choose a phase's sequences: of the last phase that had all."""
        judge = max(p for p in range(phase) if not self.phases[p].drop_percent)
        return [one for one in self.passes if one.phase == judge]

    def rescored(self, phase: int) -> Pass | None:
        """What is read again before a phase's sequences are chosen, as a part of a pass; or None.

        The first samples of the first epoch that judges.
        """
        if self._review.staleness != "rescore" or not self.phases[phase].drop_percent:
            return None
        judge = self.judges(phase)[0]
        return judge._replace(size=ceil(_share(judge.size, self._review.rescore_percent)))

    def steps(self, batch: int, phase: int | None = None) -> int:
        """Steps of `batch` samples: of the run, or those that begin in a phase.

        The last step before a selection, and the last of the run, has what is left.
        """
        order, sample, steps = self.order([self.sequences], "", 0), 0, 0
        while sample < order.end:
            now = order.pass_at(sample)
            # All that begin in this pass but the last, which may go on into the next one.
            whole = max(1, -(-(min(now.end, order.stretch_end(sample)) - sample) // batch))
            steps += whole if phase in (None, now.phase) else 0
            sample = order.step_end(sample + (whole - 1) * batch, batch)
        return steps

    def lines(self, batch: int, sequence_length: int) -> list[str]:
        """The phases in words, with their steps and tokens."""
        samples = self.passes[-1].end
        lines = [
            f"review        {len(self.phases)} phases, {len(self.passes)} epochs over "
            f"{self.sequences:,} sequences: {samples / self.sequences:.4g} times the data, "
            f"{self.steps(batch):,} steps, {samples * sequence_length:,} tokens"
        ]
        for number, phase in enumerate(self.phases):
            kept = self.sequences - self.dropped(number)
            times = f"{phase.passes} epoch{'s' * (phase.passes > 1)}"
            lines.append(
                f"  phase {number + 1:<6}{phase.name}: {times} over {kept:,} sequences "
                f"({phase.drop_percent:g} % left out), {self.steps(batch, number):,} steps, "
                f"{kept * phase.passes * sequence_length:,} tokens"
            )
            if (again := self.rescored(number)) is not None:
                lines[-1] += f", and before it {again.size:,} sequences read again, forward only"
        return lines


def dropped_by(phase: ReviewPhase, sequences: int) -> int:
    """floor(sequences * drop_percent / 100), of the decimal number as it is written."""
    return int(_share(sequences, phase.drop_percent))


def _share(sequences: int, percent: float) -> Fraction:
    """So many percent, of the decimal number as it is written."""
    # As a binary fraction 0.1 would be a little more than it says.
    return sequences * Fraction(repr(percent)) / 100


def schedule_of(config: RunConfig) -> ReviewSchedule | None:
    """The schedule of a run whose shards are there; None without data.review.

    Raises:
        DataError: the shards cannot be opened.
    """
    if config.data.review is None:
        return None
    shards = ShardSet.open(config.data.shards, config.data.train_split)
    form = sequence_format(config)
    counts = [cut_sequences(shards.of_source(name), form).count for name in shards.sources]
    return ReviewSchedule(config.data.review, sum(counts))


def planned(config: RunConfig, batch: int) -> tuple[RunConfig, list[str]]:
    """A run that is not started: with its steps, and its phases in words.

    Args:
        config: the run.
        batch: samples of a step.

    Raises:
        ConfigError: the steps follow from shards that are not there, or are others.
    """
    lines = []
    try:
        schedule = schedule_of(config)
    except DataError as error:
        review = config.data.review
        if review is not None and review.sequences is not None:
            lines = [f"review        taken to have data.review.sequences, without shards: {error}"]
            schedule = ReviewSchedule(review, review.sequences)
        elif config.train.steps is not None:
            return config, [f"review        phases are not known without the shards: {error}"]
        else:
            raise ConfigError(
                f"data.review says how many steps there are only with the shards ({error}); make "
                "them, or set data.review.sequences or train.steps"
            ) from error
    if schedule is None:
        return config, []
    lines += schedule.lines(batch, config.data.sequence_length)
    return with_steps(config, schedule, batch), lines


def with_steps(config: RunConfig, schedule: ReviewSchedule, batch: int) -> RunConfig:
    """The run with `train.steps` filled in.

    Args:
        config: the run.
        schedule: of its data.review.
        batch: samples of a step.

    Raises:
        ConfigError: it names another number of steps, or others of its keys do not fit this one.
    """
    needed = schedule.steps(batch)
    if config.train.steps not in (None, needed):
        raise ConfigError(
            f"train.steps={config.train.steps}, but data.review comes to {needed} steps of {batch} "
            f"samples over {schedule.sequences:,} sequences; leave train.steps out, or set it to "
            f"{needed} (train.stop_at_step ends a run sooner)"
        )
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    try:
        values = config.train.model_dump(exclude_unset=True) | {"steps": needed}
        sections["train"] = TrainSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError(listed(plain_problems("train", error, known_keys()))) from None
    if problems := problems_between(sections):
        raise ConfigError(listed(problems))
    return RunConfig.model_validate(sections)
