"""How often the heads agree with head 1 on held-out text, stored with an export.

    acceptance.json     positions that were compared, and at how many of them heads 1 .. k all
                        agree; and at how many a tree of drafts has what head 1 says

Exports of earlier versions have no such file, and readers of earlier versions leave it alone.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foundation.bounded_files import read_bounded
from foundation.shown_text import printable, reason
from model.errors import CheckpointError

ACCEPTANCE_NAME = "acceptance.json"
MOST_SPREAD = 2

Counts = tuple[Annotated[int, Field(ge=0, lt=2**63)], ...]


class Acceptance(BaseModel):
    """Agreement of the heads on held-out text.

    Attributes:
        agreed: positions where heads 1 .. k all predict what head 1 says in their place, for k
            from 1 to n; the first is the number of positions that were compared.
        within: the same for trees of spread 1, 2, .. (`model.decoding.tree`): positions where what
            head 1 says is on a path of the tree; empty where that was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["headway-acceptance"] = "headway-acceptance"
    version: Literal[1] = 1
    agreed: Counts = Field(min_length=1, max_length=1024)
    within: tuple[Counts, ...] = Field(default=(), max_length=MOST_SPREAD)

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if any(len(counts) != len(self.agreed) for counts in self.within):
            raise ValueError("there are not as many counts for every tree")
        for counts in (self.agreed, *self.within):
            if counts[0] != self.agreed[0] or list(counts) != sorted(counts, reverse=True):
                raise ValueError("the counts of agreement do not fall")
        if self.agreed[0] == 0:
            raise ValueError("no position was compared")
        return self

    def tokens_per_forward(self, heads: int, spread: int = 0) -> float:
        """Expected tokens that a greedy forward commits with so many heads, from 1 to `heads`.

        Args:
            heads: k.
            spread: of a tree, from 0, a chain, to as many as were measured.
        """
        counts = self.within[spread - 1] if spread else self.agreed
        return sum(counts[:heads]) / self.agreed[0]


def read_acceptance(directory: Path) -> Acceptance | None:
    """What an export says of it; None when it says nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / ACCEPTANCE_NAME
    try:
        return Acceptance.model_validate_json(read_bounded(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); export again") from error
    except ValidationError as error:
        problem = printable(error.errors()[0]["msg"])
        raise CheckpointError(f"{path} is damaged ({problem}); export again") from error
