"""What two configurations of one run differ in, and what each difference does from then on."""

import json
from typing import Any, NamedTuple

from pipeline.config.run_config import RunConfig

_NEXT_STEP = "from the next step on"
_NOT_TRAINING = "none on training"
_NONE_AFTER_START = "none: only a new run begins with it"
_SCHEDULE = "the learning rate of every later step"
_STEP_SIZE = "samples and tokens of every later step"
_SUMS = "sums in another order: losses may differ in their last digits"
_SPEED = "speed and memory, not the result"
_BAD_STEPS = "which later steps are not taken, and what follows"
_VALIDATION = "validation losses before and after are of other sequences"

# The effect of a key, else that of its section.
_EFFECTS = {
    "run": _NOT_TRAINING,
    "run.seed": "the order of the data",
    "model": "the model",
    "model.head_weights": "the weighted loss, and the gradients of every later step",
    "model.memory": "what the model reads, and how far gradients go back",
    "model.init_std": _NONE_AFTER_START,
    "model.embedding_init_std": _NONE_AFTER_START,
    "data": "the data of every later step",
    "data.shards": "none: the data are the same",
    "data.tokenizer": _NOT_TRAINING,
    "data.eval_split": _VALIDATION,
    "data.prefetch_steps": _SPEED,
    "data.document_mask": "attention and targets of every later step",
    "data.weights": "shares of the sources in every later step",
    "data.weight_schedule": "shares of the sources in every later step",
    "data.review": "the order of the data, which a checkpoint cannot go on with",
    "data.skip_batches": "batches from here on; those behind stay as they were",
    "parallel": _SUMS,
    "parallel.reduce_bucket_size": _SUMS,
    "parallel.reduce_precision": "rounding of the gradients of every later step",
    "parallel.zero_hpz_partition_size": _SPEED,
    "batch": _STEP_SIZE,
    "train": _NEXT_STEP,
    "train.steps": _SCHEDULE + "; the schedule is this long",
    "train.stop_at_step": "where this part of the run ends",
    "train.precision": "the arithmetic of every later step",
    "train.device": _SUMS,
    "train.head_backward": _SUMS,
    "train.activation_checkpointing": _SPEED,
    "train.attention": _SUMS,
    "train.compile": _SUMS,
    "train.loss_chunk_tokens": _SUMS,
    "train.transformer_engine": _SUMS,
    "train.deterministic": _SUMS,
    "train.timeout_s": _NOT_TRAINING,
    "train.heartbeat_timeout_s": _NOT_TRAINING,
    "train.stall_timeout_s": _NOT_TRAINING,
    "train.max_skipped_steps": "when the run gives up",
    "train.on_nonfinite": _BAD_STEPS,
    "train.on_spike": _BAD_STEPS,
    "train.spike_sigmas": _BAD_STEPS,
    "train.spike_window": _BAD_STEPS,
    "train.max_rollbacks": "when the run gives up",
    "train.init_from": _NONE_AFTER_START,
    "train.init_heads": _NONE_AFTER_START,
    "optimizer": _NEXT_STEP,
    "optimizer.learning_rate": _SCHEDULE,
    "optimizer.betas": _NEXT_STEP + "; the moments so far are of the old ones",
    "schedule": _SCHEDULE,
    "eval": _VALIDATION,
    "eval.every_steps": "when the run validates",
    "checkpoint": _NOT_TRAINING,
    "log": _NOT_TRAINING,
}
_HEADS = ("key", "then", "now", "effect")
_MAX_WIDTH = 40


class Change(NamedTuple):
    """A key whose value is not what it was.

    Attributes:
        key: as `section.key`.
        then: its earlier value, as in YAML and JSON.
        now: its value.
        effect: what the difference does, for a person.
    """

    key: str
    then: Any
    now: Any
    effect: str


def config_changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every key whose value differs, in the order of the file."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [
        Change(f"{section}.{key}", old[section][key], value, _effect(section, key))
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]


def table(changes: list[Change]) -> list[str]:
    """The changes as lines of columns, with a head; values that are too long are cut."""
    rows = [_HEADS, *((c.key, _shown(c.then), _shown(c.now), c.effect) for c in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _effect(section: str, key: str) -> str:
    return _EFFECTS.get(f"{section}.{key}", _EFFECTS[section])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."
