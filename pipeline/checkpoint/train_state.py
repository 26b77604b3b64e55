"""What a run must remember beside weights and optimizer: readable JSON.

Training draws no random numbers (no dropout; data order and initial weights are pure functions),
so there is no generator state to keep.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.loading.data_summary import DataSummary, differences
from data_prep.loading.mixture import BLOCK_SAMPLES, MixtureSegment
from foundation.json_text import read_json
from foundation.shown_text import printable, reason
from model.errors import CheckpointError
from pipeline.checkpoint.file_names import STATE_NAME
from pipeline.checkpoint.files import STATE_VERSION, other_version

Count = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*$", max_length=1000)]  # shown in terminals
Ranks = Annotated[int, Field(gt=0, lt=2**31)]


class Layout(BaseModel):
    """How weights and optimizer states were spread over ranks when they were saved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: Ranks
    data: Ranks
    tensor: Ranks
    stages: Ranks
    stage_plan: str = Field(default="[]", pattern=r"^\P{Cc}*$")
    zero: Count
    precision: Text


class Rollback(BaseModel):
    """A return to a checkpoint.

    Attributes:
        step: the step that was not taken and led to it.
        batches: first and last batch that are left out since.
        reason: why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Count
    batches: tuple[Count, Count]
    reason: Text


class TrainState(BaseModel):
    """Progress of a run; the same on all ranks.

    Attributes:
        step: optimizer steps behind us, skipped ones included.
        tokens: input tokens consumed.
        next_sample: first sample of the next step, counted over all ranks and epochs.
        skipped_steps: steps whose gradients were not finite.
        data_fingerprint: of the training split that `next_sample` counts in.
        data_seed: seed of the order that `next_sample` counts in.
        sequence_length: length of the sequences that `next_sample` counts.
        packing: how those sequences are cut.
        skipped_batches: batches jumped over by data.skip_batches and after rollbacks.
        rollbacks: returns to a checkpoint, oldest first.
        recent_losses: of the last steps, newest last; kept if train.on_spike needs them.
        mixture: shares of the sources, from the first sample on; empty with one source.
        samples_by_source: samples of each source before `next_sample`, skipped ones included.
        data: what the training split is, to tell another one from it.
        layout: of the checkpoint's files.
        eval_loss: validation loss after this step; None when it was not validated.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = STATE_VERSION
    step: Count = 0
    tokens: Count = 0
    next_sample: Count = 0
    skipped_steps: Count = 0
    data_fingerprint: Text
    data_seed: Count
    sequence_length: Annotated[int, Field(gt=0, lt=2**63)]
    packing: Text = "concat"
    skipped_batches: Count = 0
    mixture: list[MixtureSegment] = []
    samples_by_source: dict[Text, Count] = {}
    rollbacks: list[Rollback] = []
    recent_losses: list[float] = []
    data: DataSummary | None = None
    layout: Layout
    eval_loss: float | None = None

    @field_validator("mixture")
    @classmethod
    def _covers_every_sample(cls, mixture: list[MixtureSegment]) -> list[MixtureSegment]:
        starts = [segment.first_sample for segment in mixture]
        shares = [segment.counts.values() for segment in mixture]
        rises = starts[:1] in ([], [0]) and all(a < b for a, b in pairwise(starts))
        if not rises or any(min(c, default=0) < 0 or sum(c) != BLOCK_SAMPLES for c in shares):
            raise ValueError("no mixture")
        return mixture

    @property
    def batches(self) -> int:
        """Global batches behind us in the data order: trained on or skipped."""
        return self.step + self.skipped_batches

    def advance(
        self, *, samples: int, applied: bool, skipped_batches: int = 0, missing_samples: int = 0
    ) -> None:
        """Count one step over `samples` samples, after `skipped_batches` batches of as many.

        Of the step's samples `missing_samples` were not there: its data ended before them.
        """
        self.step += 1
        self.skipped_batches += skipped_batches
        self.next_sample += (1 + skipped_batches) * samples - missing_samples
        self.tokens += (samples - missing_samples) * self.sequence_length
        self.skipped_steps += not applied
        self.eval_loss = None

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def read_state(directory: Path) -> TrainState:
    """The state in a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not of this version.
    """
    path = directory / STATE_NAME
    if problem := other_version(directory):
        raise CheckpointError(problem)
    try:
        return TrainState.model_validate(read_json(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {STATE_NAME}, so it is not a checkpoint; give a folder such as "
            "runs/NAME/checkpoints/step_00000100, or the run's folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be understood ({_fault(error)}); use an older checkpoint or the "
            "version of Headway that wrote it"
        ) from None


def _fault(error: OSError | ValueError) -> str:
    """What is wrong with a state, without the values, which may be anything."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{printable(where)}: {first['type']}"
    return reason(error)


def layout_changes(saved: Layout, current: Layout) -> list[str]:
    """In what the layout of a checkpoint's files is not this run's, one item each."""
    return [
        f"{field} {before} -> {now}"
        for field in Layout.model_fields
        if (before := getattr(saved, field)) != (now := getattr(current, field))
    ]


def resume_problems(saved: TrainState, current: TrainState) -> list[str]:
    """Why a run cannot go on from a saved state, one line each; empty when it can.

    The layout is no reason: files of any are read in any other.
    """
    problems = []
    for field, what in (
        ("data_fingerprint", "shard set"),
        ("data_seed", "run.seed"),
        ("sequence_length", "data.sequence_length"),
        ("packing", "data.packing"),
    ):
        before, now = getattr(saved, field), getattr(current, field)
        if before != now:
            problems.append(f"{what}: saved with {before}, this run has {now}")
            if field == "data_fingerprint" and saved.data and current.data:
                problems += differences(saved.data, current.data)
    return problems
