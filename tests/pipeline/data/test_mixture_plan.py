"""Schedules of weights against checkpoints: the past stays, only the future follows the YAML."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.loading.mixture import Mixture, MixtureSegment, block_counts
from pipeline.config.data_section import WeightPhase
from pipeline.data.mixture_plan import plan_segments, weight_problems

SIZE = 8
EVEN, MOST_A, MOST_B = {"a": 1.0, "b": 1.0}, {"a": 9.0, "b": 1.0}, {"b": 1.0, "a": 0.0}


def phases(*given: tuple[int, dict[str, float]]) -> list[WeightPhase]:
    """A schedule."""
    return [WeightPhase(step=step, weights=weights) for step, weights in given]


def plan(
    wanted: list[WeightPhase], behind: int = 0, saved: list[MixtureSegment] | None = None
) -> list[MixtureSegment]:
    """The segments of a run of batches of 8 samples."""
    return plan_segments(
        wanted,
        saved=saved or [],
        batches_behind=behind,
        next_sample=behind * SIZE,
        batch_samples=SIZE,
    )


def segment(first_sample: int, weights: dict[str, float]) -> MixtureSegment:
    """A segment with these weights."""
    return MixtureSegment(first_sample=first_sample, counts=block_counts(weights))


def test_a_new_run_follows_its_schedule() -> None:
    """Steps become samples; a phase that changes nothing makes no segment."""
    wanted = phases((0, EVEN), (10, MOST_A), (20, {"a": 90, "b": 10}), (30, MOST_B))
    assert plan(wanted) == [segment(0, EVEN), segment(80, MOST_A), segment(240, MOST_B)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40))
def test_resuming_with_the_same_schedule_changes_nothing(behind: int) -> None:
    """At any step, at the steps of changes too."""
    wanted = phases((0, EVEN), (10, MOST_A), (30, MOST_B))
    assert plan(wanted, behind, plan(wanted)) == plan(wanted)


def test_only_the_future_can_be_changed() -> None:
    """New weights hold from the resumed step on, and again from a later resume on."""
    first = plan(phases((0, EVEN), (10, MOST_A)))
    second = plan(phases((0, MOST_B)), 25, first)
    assert second == [segment(0, EVEN), segment(80, MOST_A), segment(200, MOST_B)]
    assert plan(phases((0, MOST_B)), 40, second) == second
    third = plan(phases((0, MOST_A), (50, EVEN)), 40, second)
    assert third == [*second, segment(320, MOST_A), segment(400, EVEN)]
    assert plan(phases((0, MOST_B), (5, EVEN)), 7, first) == [segment(0, EVEN)]


def test_a_changed_batch_size_moves_only_what_is_ahead() -> None:
    """A phase that is 10 batches ahead stays 10 batches ahead, of the new size."""
    saved = plan(phases((0, EVEN), (20, MOST_A)))
    wanted = phases((0, EVEN), (20, MOST_A))
    found = plan_segments(
        wanted, saved=saved, batches_behind=10, next_sample=80, batch_samples=2 * SIZE
    )
    assert found == [segment(0, EVEN), segment(80 + 10 * 2 * SIZE, MOST_A)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([EVEN, MOST_A, MOST_B])), max_size=4))
def test_no_change_of_weights_loses_or_repeats_a_sample(
    resumes: list[tuple[int, dict[str, float]]],
) -> None:
    """However often a run is resumed with other weights, each source gives 0, 1, 2, ..."""
    saved, behind = plan(phases((0, EVEN))), 0
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for steps, weights in [*resumes, (10, EVEN)]:
        mixture = Mixture(("a", "b"), saved)
        for sample in range(behind * SIZE, (behind + steps) * SIZE):
            counts = mixture.counts(sample)
            after = mixture.counts(sample + 1)
            (name,) = (name for name in seen if after[name] != counts[name])
            seen[name].append(counts[name])
        behind += steps
        saved = plan(phases((0, weights)), behind, saved)
    for numbers in seen.values():
        assert numbers == list(itertools.islice(itertools.count(), len(numbers)))


def test_weights_that_do_not_fit_the_set_are_named() -> None:
    """All at once: a name with its nearest, one without, a source smaller than a sequence."""
    wanted = phases((0, {"webb": 1, "code": 0}), (5, {"quux": 1, "code": 2, "web": 0}))
    first, second, third = weight_problems(wanted, {"web": 12, "code": 0}, "data/set (train)")
    assert first.endswith("the source webb, which data/set (train) lacks; nearest: web")
    assert second.endswith("the source quux, which data/set (train) lacks; it has web, code")
    assert "source code of data/set (train) is smaller than one sequence" in third
    assert "has weight 2; give it weight 0" in third
    assert weight_problems(wanted[1:], {"quux": 1, "code": 1, "web": 0}, "set") == []
