"""The rules between the sections of a run configuration."""

from collections.abc import Callable, Mapping
from typing import Any

from model.config import ModelConfig
from pipeline.config.data_section import DataSection
from pipeline.config.sections import (
    CheckpointSection,
    EvalSection,
    ParallelSection,
    ScheduleSection,
    TrainSection,
)
from pipeline.stages.plan import num_stages, plan_problems


def problems_between(sections: Mapping[str, Any]) -> list[str]:
    """Broken rules between sections; a rule waits until the sections it needs are sound."""
    rules: tuple[tuple[Callable[..., list[str]], tuple[str, ...]], ...] = (
        (_tensor_parallel_problems, ("model", "parallel")),
        (_stage_problems, ("model", "parallel")),
        (_staged_backward_problems, ("parallel", "train")),
        (_partition_problems, ("parallel",)),
        (_frozen_stages_problems, ("parallel", "train")),
        (_window_problems, ("model", "data")),
        (_length_problems, ("train", "data")),
        (_schedule_problems, ("train", "schedule")),
        (_review_problems, ("train", "data")),
        (_freeze_problems, ("model", "train")),
        (_best_checkpoint_problems, ("eval", "checkpoint")),
        (_memory_problems, ("model", "data", "parallel", "train")),
    )
    problems = []
    for rule, needed in rules:
        if all(name in sections for name in needed):
            problems += rule(*(sections[name] for name in needed))
    return problems


def _tensor_parallel_problems(model: ModelConfig, parallel: ParallelSection) -> list[str]:
    smaller = [size for size in model.tensor_parallel_sizes if size < parallel.tensor]
    listed = " or ".join(str(size) for size in smaller[-3:])
    return [
        f"model.{problem}; or set parallel.tensor to {listed}"
        for problem in model.check_tensor_parallel(parallel.tensor)
    ]


def _window_problems(model: ModelConfig, data: DataSection) -> list[str]:
    if model.future_tokens < data.sequence_length:
        return []
    return [
        f"data.sequence_length={data.sequence_length} must be greater than model.future_tokens="
        f"{model.future_tokens}; raise it to at least {model.future_tokens + 1}"
    ]


def _schedule_problems(train: TrainSection, schedule: ScheduleSection) -> list[str]:
    if train.steps is None:  # not known yet; they are filled in, and looked at again
        return []
    if schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > train.steps:
        return [
            f"schedule.decay_steps={schedule.decay_steps} and schedule.warmup_steps="
            f"{schedule.warmup_steps} take more than train.steps={train.steps}; lower decay_steps "
            f"to at most {train.steps - schedule.warmup_steps} or raise train.steps"
        ]
    return []


def _length_problems(train: TrainSection, data: DataSection) -> list[str]:
    if train.steps is not None or data.review is not None:
        return []
    if "steps" in train.model_fields_set:
        return [
            "train.steps=null is empty, must be a whole number; give it a value, which only "
            "data.review does by itself"
        ]
    return [
        "train.steps is missing and has no default; add it to the YAML or pass --set "
        "train.steps=VALUE"
    ]


def _review_problems(train: TrainSection, data: DataSection) -> list[str]:
    """What does not go together with phases in which each sequence comes exactly once."""
    if data.review is None:
        return []
    alike = "all sources are gone over alike; leave it out"
    conflicts = (
        (data.weights is not None, "data.weights", alike),
        (bool(data.weight_schedule), "data.weight_schedule", alike),
        (
            bool(data.skip_batches),
            "data.skip_batches",
            "each epoch has all sequences; leave it out",
        ),
        (
            train.on_spike == "rollback",
            "train.on_spike=rollback",
            "it leaves sequences out; use skip, stop or ignore",
        ),
        (
            train.on_nonfinite == "rollback",
            "train.on_nonfinite=rollback",
            "it leaves sequences out; use skip or stop",
        ),
        (
            train.head_backward == "joint",
            "train.head_backward=joint",
            "it gives no loss for each sequence; use sequential",
        ),
        (
            train.freeze == "trunk",
            "train.freeze=trunk",
            "head 1, by whose losses sequences are chosen, learns nothing; use none",
        ),
    )
    return [
        f"{setting} cannot be used with data.review: {reason}"
        for is_set, setting, reason in conflicts
        if is_set
    ]


def _freeze_problems(model: ModelConfig, train: TrainSection) -> list[str]:
    if train.freeze == "none":
        return []
    if train.freeze == "early_exit":
        return _early_exit_problems(model)
    if train.freeze == "all_but_memory":
        if model.memory is not None:
            return []
        return [
            "train.freeze=all_but_memory leaves nothing to train with model.memory=null; give the "
            "model a memory, such as model.memory={segment: 512}, or set train.freeze=none"
        ]
    if model.head_kind == "anticausal":
        return [
            "train.freeze=trunk leaves nothing to train with model.head_kind=anticausal, where the "
            "next token passes all heads; choose another kind, or train.freeze=none"
        ]
    if model.future_tokens > 1:
        return []
    return [
        "train.freeze=trunk leaves nothing to train with model.future_tokens=1, since head 1 "
        "belongs to the frozen model; set model.future_tokens to 2 or more, or train.freeze=none"
    ]


def _early_exit_problems(model: ModelConfig) -> list[str]:
    wanted = {"future_tokens": 1, "head_kind": "parallel", "lm_head": "shared"}
    return [
        f"train.freeze=early_exit trains one adapter for the model's own LM head, and "
        f"model.{key}={getattr(model, key)} is of other heads; set model.{key}={value}, or "
        "train.freeze=trunk"
        for key, value in wanted.items()
        if getattr(model, key) != value
    ]


def _stage_problems(model: ModelConfig, parallel: ParallelSection) -> list[str]:
    return plan_problems(parallel.stages, model)


def _staged_backward_problems(parallel: ParallelSection, train: TrainSection) -> list[str]:
    if train.head_backward == "sequential" or num_stages(parallel.stages) == 1:
        return []
    return [
        "train.head_backward=joint is the reference of runs with one stage, and this run has "
        f"{num_stages(parallel.stages)}; set train.head_backward=sequential or parallel.stages=1"
    ]


def _frozen_stages_problems(parallel: ParallelSection, train: TrainSection) -> list[str]:
    if train.freeze == "none" or num_stages(parallel.stages) == 1:
        return []
    return [
        f"train.freeze={train.freeze} leaves the trunk's stages nothing to train, and each of the "
        f"{num_stages(parallel.stages)} stages has an optimizer; set parallel.stages=1"
    ]


def _partition_problems(parallel: ParallelSection) -> list[str]:
    size = parallel.zero_hpz_partition_size
    if size == 1 or (parallel.zero == 3 and num_stages(parallel.stages) == 1):
        return []
    return [
        f"parallel.zero_hpz_partition_size={size} is for ZeRO-3 with one stage, here are "
        f"parallel.zero={parallel.zero} and {num_stages(parallel.stages)} stages; set it to 1, or "
        "parallel.zero=3 and parallel.stages=1"
    ]


def _best_checkpoint_problems(evaluation: EvalSection, checkpoint: CheckpointSection) -> list[str]:
    if not checkpoint.keep_best:
        return []
    best, saves, validations = (
        f"checkpoint.keep_best={checkpoint.keep_best}",
        checkpoint.every_steps,
        evaluation.every_steps,
    )
    if not validations:
        return [
            f"{best} needs validation losses, and eval.every_steps=0 makes none; set "
            "eval.every_steps, or keep_best=0"
        ]
    if saves % validations:
        return [
            f"{best} compares validation losses of saved weights, but steps of "
            f"checkpoint.every_steps={saves} are not all validated with eval.every_steps="
            f"{validations}; make every_steps a multiple of it, or set keep_best=0"
        ]
    return []


def _memory_problems(
    model: ModelConfig, data: DataSection, parallel: ParallelSection, train: TrainSection
) -> list[str]:
    if model.memory is None:
        return []
    segment, stages, problems = model.memory.segment, num_stages(parallel.stages), []
    if data.sequence_length <= segment:
        problems.append(
            f"model.memory.segment={segment} holds all of data.sequence_length="
            f"{data.sequence_length}, so nothing would be remembered; use longer sequences or "
            f"segments of at most {max(1, data.sequence_length // 2)}"
        )
    if stages > 1:
        problems.append(
            f"model.memory passes every segment through the whole trunk before the next one, and "
            f"parallel.stages cuts the trunk into {stages} stages; set parallel.stages=1"
        )
    if train.activation_checkpointing == "full":
        problems.append(
            "train.activation_checkpointing=full gives a layer a gradient for every segment, "
            "and ZeRO takes one for all of model.memory's; set it to selective or none, and "
            "lower model.memory.bptt to keep fewer segments"
        )
    if model.memory.adapter_rank and train.freeze != "all_but_memory":
        problems.append(
            f"model.memory.adapter_rank={model.memory.adapter_rank} adds adapters to weights that "
            "are trained themselves; set train.freeze=all_but_memory, or adapter_rank=0"
        )
    return problems
