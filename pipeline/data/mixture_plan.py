"""From `data.weights` and `data.weight_schedule` to the mixture of a run, new or resumed.

What was trained on is history: segments of the mixture that lie behind a resumed run are taken from
its checkpoint, whatever the configuration says now, so the position in each source never jumps.
Only what is ahead follows the configuration.
"""

import difflib
from collections.abc import Mapping, Sequence

from data_prep.loading.loader import TokenLoader
from data_prep.loading.mixture import Mixture, MixtureSegment, block_counts
from model.errors import CheckpointError
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.data_section import WeightPhase


def weight_problems(
    phases: Sequence[WeightPhase], sequences_by_source: Mapping[str, int], where: str
) -> list[str]:
    """What keeps weights from being used with a shard set, one line each.

    Args:
        phases: The schedule.
        sequences_by_source: Sequences that each source of the training split can be cut into.
        where: The shard set, in words.
    """
    problems: dict[str, None] = {}
    for phase in phases:
        for name, weight in phase.weights.items():
            if name not in sequences_by_source:
                near = difflib.get_close_matches(name, sequences_by_source, n=1, cutoff=0.6)
                remedy = (
                    f"nearest: {near[0]}" if near else f"it has {', '.join(sequences_by_source)}"
                )
                problems[f"data weights name the source {name}, which {where} lacks; {remedy}"] = (
                    None
                )
            elif weight > 0 and not sequences_by_source[name]:
                problems[
                    f"source {name} of {where} is smaller than one sequence of "
                    f"data.sequence_length + model.future_tokens, but has weight {weight:g}; give "
                    "it weight 0, or use shorter sequences"
                ] = None
    return list(problems)


def plan_segments(
    phases: Sequence[WeightPhase],
    *,
    saved: Sequence[MixtureSegment],
    batches_behind: int,
    next_sample: int,
    batch_samples: int,
) -> list[MixtureSegment]:
    """The whole run's mixture, in samples.

    A phase's step counts batches of the data order, as steps do while no batch is skipped.

    Args:
        phases: What the configuration asks for; the first has step 0.
        saved: The mixture as the checkpoint has it; empty for a new run.
        batches_behind: Batches that were trained on or skipped so far.
        next_sample: The sample after those.
        batch_samples: Samples of a batch from now on.
    """
    assert phases, "a mixture has at least one phase"
    assert phases[0].step == 0, phases[0]
    segments = [segment for segment in saved if segment.first_sample < max(next_sample, 1)]
    in_force = [phase for phase in phases if phase.step <= batches_behind]
    wanted = [(next_sample if segments else 0, in_force[-1])]
    wanted += [
        (next_sample + (phase.step - batches_behind) * batch_samples, phase)
        for phase in phases[len(in_force) :]
    ]
    for first_sample, phase in wanted:
        counts = block_counts(phase.weights)
        if not segments or _shares(segments[-1].counts) != _shares(counts):
            segments.append(MixtureSegment(first_sample=first_sample, counts=counts))
    return segments


def _shares(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def plan_mixture(
    loader: TokenLoader, phases: Sequence[WeightPhase], state: TrainState
) -> Mixture | None:
    """The mixture of the run, what is behind it and what is ahead; None with one source.

    Args:
        loader: Of the training split.
        phases: What the configuration asks for.
        state: New, or as the checkpoint has it.

    Raises:
        CheckpointError: The checkpoint's counters are not those of its own mixture.
    """
    sources = loader.shards.sources
    if len(sources) < 2:
        return None
    segments = plan_segments(
        phases,
        saved=state.mixture,
        batches_behind=state.batches,
        next_sample=state.next_sample,
        batch_samples=loader.global_batch_size,
    )
    mixture = Mixture(sources, segments)
    counts = mixture.counts(state.next_sample)
    if state.mixture and state.samples_by_source != counts:
        raise CheckpointError(
            f"the checkpoint counts samples {state.samples_by_source}, but its mixture gives "
            f"{counts} before sample {state.next_sample}; it was changed: use an older one"
        )
    return mixture
