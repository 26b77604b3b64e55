"""What is measured, and what came out."""

from dataclasses import dataclass
from typing import Literal

from model.structure.head_kinds import HeadKind

Mode = Literal["sequential", "joint", "frozen"]  # frozen: sequential, heads 2 .. n alone


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
        layers: L, trunk and heads together, so that n does not change the parameters.
        hidden_size: H; attention heads are 64 wide.
        batch: B.
        sequence: S.
        chunk_tokens: tokens whose logits the sequential step forms at once.
        kind: of the heads.
    """

    layers: int
    hidden_size: int
    batch: int
    sequence: int
    chunk_tokens: int
    kind: HeadKind = "parallel"


@dataclass(frozen=True)
class Point:
    """One cell of the table."""

    vocabulary: int
    heads: int
    mode: Mode


@dataclass(frozen=True)
class Measurement:
    """What one step needed.

    Attributes:
        saved_bytes: most bytes alive that autograd kept for backward, parameters left out.
        peak_bytes: most memory in use: on a CPU the growth of the process's resident set, from
            before the model was built; on a GPU what torch had allocated.
        step_s: median seconds of a step; None when not asked for.
    """

    saved_bytes: int
    peak_bytes: int
    step_s: float | None
