"""How often the heads agree with head 1 on held-out text, stored with an export.

    acceptance.json     positions that were compared, and at how many of them heads 1 .. k all agree

Exports of earlier versions have no such file, and readers of earlier versions leave it alone.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from foundation.bounded_files import read_bounded
from foundation.shown_text import printable, reason
from model.errors import CheckpointError

ACCEPTANCE_NAME = "acceptance.json"


class Acceptance(BaseModel):
    """Agreement of the heads on held-out text.

    Attributes:
        agreed: positions where heads 1 .. k all predict what head 1 says in their place, for k
            from 1 to n; the first is the number of positions that were compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["headway-acceptance"] = "headway-acceptance"
    version: Literal[1] = 1
    agreed: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.agreed[0] == 0 or list(self.agreed) != sorted(self.agreed, reverse=True):
            raise ValueError("the counts of agreement do not fall")
        return self

    def tokens_per_forward(self, heads: int) -> float:
        """Expected tokens that a greedy forward commits with so many heads, from 1 to `heads`."""
        return sum(self.agreed[:heads]) / self.agreed[0]


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
