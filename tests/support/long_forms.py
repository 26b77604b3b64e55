"""A part of a long matrix for `make test`; the whole of it is for `make stress`."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

Case = TypeVar("Case")


def part_of(cases: Iterable[Case], keep: Callable[[int, Case], bool]) -> list[ParameterSet]:
    """Every case, those that `keep` leaves out marked for `make stress`.

    Args:
        cases: of a parametrized test.
        keep: whether `make test` runs a case, given its number and itself.
    """
    return [
        pytest.param(case, marks=[] if keep(number, case) else [pytest.mark.stress])
        for number, case in enumerate(cases)
    ]
