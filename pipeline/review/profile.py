"""Which sequences a run learned, unlearned and forgot: from the losses of its epochs.

Learning, forgetting and descents as in Prakriya et al. 2024: a sequence's loss falls when it is
learned, and one that was learned and whose loss rises again is forgotten.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foundation.json_text import read_json
from foundation.shown_text import reason
from model.errors import ConfigError
from pipeline.review.files import INDEX, losses_name, read_losses, review_folder

_CHUNK = 1 << 22
# Of the paper's eight epochs of GPT-2 on OpenWebText.
PUBLISHED_FORGOTTEN, PUBLISHED_SEVERAL = 0.25, 0.82


class Profile(NamedTuple):
    """How many sequences did what; each count over those seen at least twice.

    Attributes:
        sequences: seen at least twice.
        learned: whose last loss is below their first.
        unlearned: whose last loss is not below their first.
        forgotten: whose loss rose after it had fallen, at least once.
        forgotten_again: more than once.
        descents: `[times + 1]` sequences by how often their loss began to fall.
    """

    sequences: int
    learned: int
    unlearned: int
    forgotten: int
    forgotten_again: int
    descents: list[int]

    @property
    def forgotten_share(self) -> float:
        """Of all sequences."""
        return self.forgotten / max(self.sequences, 1)

    @property
    def forgotten_again_share(self) -> float:
        """Of those that were forgotten."""
        return self.forgotten_again / max(self.forgotten, 1)


def epochs_of(run_dir: Path) -> list[NDArray[np.float32]]:
    """The losses of every epoch of a run that is over, mapped.

    Raises:
        ConfigError: the run has none, or they are damaged.
    """
    folder = review_folder(run_dir)
    try:
        index = read_json(folder / INDEX)
        paths = [folder / losses_name(number) for number in range(len(index["epochs"]))]
        found = [read_losses(path, index["sequences"]) for path in paths if path.is_file()]
    except FileNotFoundError:
        found = []
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = reason(error) if isinstance(error, OSError) else f"{folder / INDEX} is no index"
        raise ConfigError(
            f"the review of {run_dir} is damaged ({what}); the run's checkpoints have the same "
            "files, and resuming the run puts them back"
        ) from error
    if len(found) < 2:
        raise ConfigError(
            f"{review_folder(run_dir)} has losses of fewer than two epochs; give the folder of a "
            "run with data.review that has done two"
        )
    return found


def profile_of(epochs: Sequence[NDArray[np.float32]]) -> Profile:
    """Count over all sequences, a part of them at a time.

    Args:
        epochs: `[sequences]` losses each; below 0 = not in that epoch, nan = higher than any.
    """
    counts = np.zeros(5, np.int64)
    descents = np.zeros(len(epochs) + 1, np.int64)
    for start in range(0, len(epochs[0]), _CHUNK):
        part = _seen_part(epochs, start)
        twice = part.seen > 1
        lower = part.last < part.first
        counts += [
            int(np.count_nonzero(twice & what))
            for what in (twice, lower, ~lower, part.forgotten > 0, part.forgotten > 1)
        ]
        descents += np.bincount(part.descents[twice], minlength=len(descents))
    last = int(np.flatnonzero(descents).max(initial=0))
    seen, learned, unlearned, forgotten, again = counts.tolist()
    shown = descents[: last + 1].tolist()
    return Profile(seen, learned, unlearned, forgotten, again, shown)


def hardest_and_most_forgotten(
    epochs: Sequence[NDArray[np.float32]], count: int
) -> tuple[list[int], list[int]]:
    """Numbers of the sequences of the highest last loss, and of those that were forgotten most.

    Each at most `count`, the first one foremost; of those forgotten as often the higher last loss
    comes first, of equal ones the lower number.

    Args:
        epochs: as in `profile_of`.
        count: of each.
    """
    hardest, forgotten = (np.zeros((0, 3)) for _ in "ab")
    for start in range(0, len(epochs[0]), _CHUNK):
        part = _seen_part(epochs, start)
        numbers = start + np.arange(len(part.last))
        # As order and last loss of what is sorted by both, and the number.
        for_last = np.stack([np.zeros(len(numbers)), part.last, numbers], 1)[part.seen > 0]
        for_times = np.stack([part.forgotten, part.last, numbers], 1)[part.forgotten > 0]
        hardest = _first(np.concatenate([hardest, for_last]), count)
        forgotten = _first(np.concatenate([forgotten, for_times]), count)
    return [int(n) for n in hardest[:, 2]], [int(n) for n in forgotten[:, 2]]


def _first(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """The rows `[times, loss, number]` that come first, the highest of the first two foremost."""
    order = np.lexsort((rows[:, 2], -rows[:, 1], -rows[:, 0]))
    return rows[order[:count]]


def _seen_part(epochs: Sequence[NDArray[np.float32]], start: int) -> "_Part":
    """Some sequences over all epochs."""
    part = _Part(epochs[0][start : start + _CHUNK])
    for losses in epochs[1:]:
        part.see(losses[start : start + _CHUNK])
    return part


class _Part:
    """What has been seen of some sequences so far.

    Args:
        losses: of the first epoch.
    """

    def __init__(self, losses: NDArray[np.float32]) -> None:
        self.first = np.full(len(losses), np.inf, np.float32)
        self.last = self.first.copy()
        self.seen, self.forgotten, self.descents = (np.zeros(len(losses), np.int16) for _ in "abc")
        self._has_fallen = np.zeros(len(losses), np.bool_)
        self._falls = self._has_fallen.copy()
        self.see(losses)

    def see(self, losses: NDArray[np.float32]) -> None:
        """Go on with an epoch; sequences that are not in it stay as they are."""
        here = ~(losses < 0)
        now = np.where(np.isnan(losses), np.float32(np.inf), losses)
        known = here & (self.seen > 0)
        falls, rises = known & (now < self.last), known & (now > self.last)
        self.descents += falls & ~self._falls
        # Once for each time that it had fallen: what goes on rising is not forgotten twice.
        self.forgotten += rises & self._has_fallen
        self._has_fallen = (self._has_fallen | falls) & ~rises
        self._falls = (self._falls | falls) & ~rises
        self.first = np.where(here & (self.seen == 0), now, self.first)
        self.last = np.where(here, now, self.last)
        self.seen += here
