"""How much each head's loss counts, the same for a whole run or by the step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, cast

from pydantic import Discriminator, Field, Strict, Tag

_SHOWN = 200  # letters
_STEPS = 1 << 62

Weights = Annotated[tuple[float, ...], Strict(False)]


class WeightsFrom(NamedTuple):
    """Weights from a step on.

    Attributes:
        step: they hold after so many steps of the run; 0 in the first phase.
        weights: of each head, head 1 first.
    """

    step: int
    weights: tuple[float, ...]


_Phase = Annotated[tuple[Annotated[int, Field(ge=0, le=_STEPS)], Weights], Strict(False)]
_Schedule = Annotated[tuple[_Phase, ...], Strict(False)]


def _form(value: Any) -> str:
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return "<schedule>" if listed and isinstance(value[0], list | tuple | dict) else "<weights>"


# One number per head, or [step, numbers] for each phase. Tags in angle brackets are no keys.
HeadWeights = Annotated[
    Annotated[Weights, Tag("<weights>")] | Annotated[_Schedule, Tag("<schedule>")],
    Discriminator(_form),
]


def phases(setting: "HeadWeights | None", num_heads: int) -> tuple[WeightsFrom, ...]:
    """The setting as a schedule; all 1 without one."""
    if setting is None:
        return (WeightsFrom(0, (1.0,) * num_heads),)
    if is_schedule(setting):
        return tuple(WeightsFrom(*phase) for phase in cast(_Schedule, setting))
    return (WeightsFrom(0, cast(tuple[float, ...], setting)),)


def is_schedule(setting: "HeadWeights | None") -> bool:
    """Whether weights change by the step."""
    return bool(setting) and _form(setting) == "<schedule>"


def weights_after(setting: "HeadWeights | None", num_heads: int, steps: int) -> tuple[float, ...]:
    """The weights of the step that follows after `steps` steps: a function of the step alone."""
    return [phase for phase in phases(setting, num_heads) if phase.step <= steps][-1].weights


def problems(setting: "HeadWeights", num_heads: int | None) -> list[str]:
    """What is wrong with a setting, one line each.

    Args:
        setting: of well-formed numbers.
        num_heads: of the model; None where that is not known.
    """
    if not is_schedule(setting):
        return _weights_problems("head_weights", cast(tuple[float, ...], setting), num_heads)
    schedule, found = phases(setting, num_heads or 0), []
    if schedule[0].step != 0:
        found.append(
            f"head_weights starts at step {schedule[0].step}; its first phase must be of step 0, "
            "the weights at the start of the run"
        )
    found += [
        f"head_weights has step {after.step} after step {before.step}; put the phases in the order "
        "of their steps, each once"
        for before, after in pairwise(schedule)
        if after.step <= before.step
    ]
    for index, phase in enumerate(schedule):
        found += _weights_problems(f"head_weights[{index}]", phase.weights, num_heads)
    return found


def _weights_problems(key: str, weights: tuple[float, ...], num_heads: int | None) -> list[str]:
    found = []
    shown = str(list(weights))
    shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
    if num_heads is not None and len(weights) != num_heads:
        found.append(
            f"{key} has {len(weights)} values, but model.future_tokens={num_heads}; "
            "give one weight per head, or null for all 1"
        )
    if any(weight < 0 for weight in weights):
        found.append(f"{key}={shown} has a negative weight; use 0 to leave a head out")
    elif not any(weights):
        found.append(
            f"{key}={shown} has no weight above 0, so nothing would be "
            "learned; give at least one head a positive weight"
        )
    return found
