"""The sections of a run configuration: their keys, defaults, and the rules within each."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from model.structure.freezing import Freeze
from pipeline.config.problems import shown
from pipeline.stages.plan import StagesSetting, setting_problem

# What files and other processes count with.
MAX_COUNT = (1 << 63) - 1
# The heartbeat is once a second, and a rank looks once a second: up to two pass in silence.
_MIN_HEARTBEAT_S = 5
_YEAR_S = 31_536_000
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Samples = Annotated[int, Field(gt=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
# Products of fewer tokens leave a GPU's cores waiting; a CPU's caches prefer them.
_GPU_CHUNK_TOKENS, _CPU_CHUNK_TOKENS = 4096, 1024


# Control characters, separators of lines and halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _printable(text: str) -> str:
    if _UNPRINTABLE.search(text):
        raise PydanticCustomError("not_printable", "a control character")
    return text


def _path_from_text(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        return value
    longest = max(len(part.encode()) for part in _printable(value).split("/"))
    if longest > _LONGEST_NAME or len(value.encode()) > _LONGEST_PATH:
        raise PydanticCustomError("path_too_long", "longer than file systems take")
    return Path(value)


Name = Annotated[str, AfterValidator(_printable)]
FilePath = Annotated[Path, BeforeValidator(_path_from_text)]


def _run_dir(fields: dict[str, Any]) -> Path:
    return Path("runs") / str(fields["name"])


class Section(BaseModel):
    """What all sections share: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """Name, folder and seed of a run.

    Attributes:
        name: of the run; letters, digits, - and _.
        dir: folder of everything that the run writes; runs/NAME unless given.
        seed: of initial weights and data order.
        notify: shell command that one rank, or the job script, runs when the run has ended or
            failed; it finds HEADWAY_STATUS, HEADWAY_RUN, HEADWAY_STEP, HEADWAY_RUN_DIR and
            HEADWAY_REASON in its environment.
    """

    name: Name
    dir: FilePath = Field(default_factory=_run_dir)
    seed: int = Field(default=1234, ge=0, lt=2**32)
    notify: Name | None = None

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        is_long = len(name.encode()) > _LONGEST_NAME
        if not name.strip() or "/" in name or name.startswith(".") or is_long:
            raise ValueError(
                f"name={shown(name)} cannot be a folder name; use letters, digits, - and _"
            )
        return name


class ParallelSection(Section):
    """How the model is spread over ranks; data parallelism takes the ranks that are left.

    Attributes:
        tensor: tensor-parallel ranks; must divide attention_heads, kv_heads, ffn_hidden_size and
            vocab_size of the model.
        zero: ZeRO level of the data-parallel ranks: 0 = everything on each; 1 = optimizer states
            divided; 2 = gradients, too; 3 = weights, too.
        stages: pipeline stages: 1, auto:S, or what each stage holds, such as
            [trunk: 0-13, trunk: 14-27, heads: 1-2, heads: 3-4].
        reduce_bucket_size: gradient elements that ZeRO reduces at once.
        reduce_precision: in which data-parallel ranks add up gradients in a bf16 run; auto = bf16
            below 64 of them, fp32 from there on.
        zero_hpz_partition_size: ZeRO-3 with one stage: so many neighboring data-parallel ranks keep
            a copy of the weights among them between a step's first forward and its end, and gather
            there instead of over the network (GPUs of a node / tensor); must divide the
            data-parallel ranks; 1 = no copy.
    """

    tensor: PositiveInt = 1
    zero: int = Field(default=3, ge=0, le=3)
    stages: StagesSetting = 1
    reduce_bucket_size: PositiveInt = 500_000_000
    reduce_precision: Literal["auto", "fp32", "bf16"] = "auto"
    zero_hpz_partition_size: PositiveInt = 1

    @field_validator("stages", mode="before")
    @classmethod
    def _is_a_stage_plan(cls, stages: object) -> object:
        if isinstance(stages, list | tuple):
            stages = tuple(stages)
            if not all(isinstance(stage, dict) for stage in stages):
                raise ValueError(setting_problem(str(list(stages))))
        elif isinstance(stages, bool) or not isinstance(stages, int | str):
            raise ValueError(setting_problem(str(stages)))
        if problem := setting_problem(stages):
            raise ValueError(problem)
        return stages


class BatchSection(Section):
    """Samples of a step: micro_size * accumulation on each data-parallel rank.

    Attributes:
        micro_size: samples of one forward on a data-parallel rank.
        accumulation: micro-batches of a step on a data-parallel rank.
    """

    micro_size: Samples
    accumulation: Samples = 1


class TrainSection(Section):
    """Length, arithmetic and limits of the training loop.

    Attributes:
        steps: optimizer steps of the whole run; the schedule's length. May be left out with
            data.review, which says how many there are.
        stop_at_step: end this part of the run earlier, at the same schedule.
        precision: auto = bf16 on a GPU, fp32 on a CPU.
        device: auto = a GPU where there is one.
        head_backward: sequential = one head at a time; joint = the reference.
        activation_checkpointing: full = keep each layer's input only; selective = run the core
            attention again.
        attention: torch's kernel for causal attention on GPUs: cudnn, flash, efficient or math;
            auto = the first of them that can be used. On a CPU torch chooses.
        compile: let torch.compile make the kernels of norms, rotation, activation and loss, in some
            seconds of every process's start; needs a C++ compiler, on a GPU Triton. auto = on a GPU
            that has them, unless the run is deterministic or has several stages.
        loss_chunk_tokens: tokens of a micro-batch whose logits exist at once; auto = 4096 on a GPU,
            1024 on a CPU.
        transformer_engine: use its layers on GPUs where it is installed.
        deterministic: kernels on a GPU that give the same bits each time, at some cost in speed;
            without it a resume repeats to rounding. CPUs always repeat.
        timeout_s: after this an unanswered collective fails.
        heartbeat_timeout_s: silence after which a rank counts as dead.
        stall_timeout_s: a step, an evaluation or a save hangs after this time, or after ten times
            the longest of the last ones of its kind where that is more.
        max_skipped_steps: steps in a row that are not taken before giving up.
        on_nonfinite: a step whose loss or gradients are not finite is never taken; then: skip = go
            on with the next; rollback = go back to the last checkpoint and leave out the batches
            since then; stop = end the run.
        on_spike: the same for a step whose loss is too high; ignore = take it.
        spike_sigmas: robust standard deviations above the median of the last losses from which on
            a loss is too high.
        spike_window: how many losses that are; until half of them are known none is too high.
        max_rollbacks: returns in the whole run before giving up.
        init_from: folder of a Hugging Face Llama, or of an export of Headway, whose weights a new
            run begins with; without effect on a resumed one.
        init_heads: heads that the folder lacks: copy = of its last layer; fresh = untrained. Of an
            early-exit adapter copy = of the layer above its exit.
        freeze: trunk = train heads 2 .. n alone and leave the next-token model (embedding, trunk,
            head 1, final norm, unembedding) as it was imported. early_exit = train head 1 alone, an
            adapter on the first layers of the folder's model, as many as the trunk has.
            all_but_memory = train what model.memory adds alone.
    """

    steps: PositiveInt | None = None
    stop_at_step: PositiveInt | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    head_backward: Literal["sequential", "joint"] = "sequential"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    loss_chunk_tokens: PositiveInt | Literal["auto"] = "auto"
    transformer_engine: bool = False
    deterministic: bool = False
    timeout_s: float = Field(default=600.0, ge=1, le=_YEAR_S)
    heartbeat_timeout_s: float = Field(default=40.0, ge=_MIN_HEARTBEAT_S, le=_YEAR_S)
    stall_timeout_s: float = Field(default=60.0, ge=1, le=_YEAR_S)
    max_skipped_steps: Count = 5
    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    spike_sigmas: float = Field(default=8.0, gt=0, le=1e6)
    spike_window: int = Field(default=100, ge=4, le=10_000)
    max_rollbacks: Count = 3
    init_from: FilePath | None = None
    init_heads: Literal["copy", "fresh"] = "copy"
    freeze: Freeze = "none"

    def chunk_tokens(self, device_type: str) -> int:
        """Tokens whose logits exist at once on a `cuda` or `cpu` device."""
        if self.loss_chunk_tokens == "auto":
            return _GPU_CHUNK_TOKENS if device_type == "cuda" else _CPU_CHUNK_TOKENS
        return self.loss_chunk_tokens

    @field_validator("loss_chunk_tokens", mode="before")
    @classmethod
    def _is_a_chunk(cls, chunk: object) -> object:
        if chunk == "auto" or (type(chunk) is int and chunk > 0):
            return chunk
        raise ValueError(
            f"loss_chunk_tokens={shown(chunk)} must be auto or a whole number above 0; auto is "
            f"{_GPU_CHUNK_TOKENS} on a GPU and {_CPU_CHUNK_TOKENS} on a CPU"
        )

    @field_validator("compile", mode="before")
    @classmethod
    def _is_a_choice(cls, choice: object) -> object:
        if choice == "auto" or isinstance(choice, bool):
            return choice
        raise ValueError(f"compile={shown(choice)} must be auto, true or false")

    @field_validator("freeze")
    @classmethod
    def _freezes_what_was_trained(cls, freeze: str, info: ValidationInfo) -> str:
        if freeze != "none" and "init_from" in info.data and info.data["init_from"] is None:
            what = "the memory of" if freeze == "all_but_memory" else "heads on"
            raise ValueError(
                f"freeze={freeze} would train {what} a model that was never trained; set "
                "train.init_from to the folder of one, or train.freeze=none"
            )
        return freeze

    @field_validator("stop_at_step")
    @classmethod
    def _stops_within_the_run(cls, stop_at_step: int | None, info: ValidationInfo) -> int | None:
        steps = info.data.get("steps")
        if stop_at_step is not None and steps is not None and stop_at_step > steps:
            raise ValueError(
                f"stop_at_step={stop_at_step} is past train.steps={steps}; "
                f"lower it to at most {steps} or raise train.steps"
            )
        return stop_at_step


class OptimizerSection(Section):
    """AdamW and gradient clipping.

    Attributes:
        learning_rate: peak of the schedule.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, of matrices; norms have none.
        gradient_clipping: largest global gradient norm; 0 = no clipping.
    """

    learning_rate: PositiveFloat
    betas: Annotated[tuple[float, float], Strict(False)] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clipping: float = Field(default=1.0, ge=0)

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"betas={list(betas)} must each be at least 0 and below 1; "
                "the paper uses [0.9, 0.95]"
            )
        return betas


class ScheduleSection(Section):
    """Learning rate over the run, as a share of optimizer.learning_rate.

    Attributes:
        kind: shape after the warm-up: cosine or linear = falls to the end; wsd = holds, then falls
            over decay_steps.
        warmup_steps: steps of linear warm-up from 0.
        final_ratio: the last step's rate over the peak.
        decay_steps: length of the fall at the end of a wsd schedule; for wsd only.
    """

    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_steps: Count
    final_ratio: float = Field(default=0.03, ge=0, le=1)
    decay_steps: PositiveInt | None = Field(default=None, validate_default=True)

    @field_validator("decay_steps")
    @classmethod
    def _belongs_to_wsd(cls, decay_steps: int | None, info: ValidationInfo) -> int | None:
        kind = info.data.get("kind")
        if kind == "wsd" and decay_steps is None:
            raise ValueError(
                "decay_steps is missing: schedule.kind=wsd holds the rate and then lets it fall "
                "over decay_steps; set schedule.decay_steps, often a tenth of train.steps"
            )
        if kind in ("cosine", "linear") and decay_steps is not None:
            raise ValueError(
                f"decay_steps={decay_steps} has no effect with schedule.kind={kind}; "
                "set schedule.decay_steps=null or schedule.kind=wsd"
            )
        return decay_steps


class EvalSection(Section):
    """Validation in the loop.

    Attributes:
        every_steps: steps between validations, and once at the end; 0 = no validation.
        samples: of the validation split, the same ones each time.
    """

    every_steps: Count = 0
    samples: Samples = 64


class CheckpointSection(Section):
    """Checkpoints to resume from.

    Attributes:
        every_steps: steps between them; 0 = only at the end.
        asynchronous: training waits for a copy to host memory only, not for the disk.
        on_error: a save fails: warn = say so and go on; stop = end the run. The last save of a
            run ends it with an error either way.
        keep: how many of the newest stay.
        keep_every: those of every so many steps stay for good; 0 = none.
        keep_best: how many of the lowest validation loss stay; 0 = none.
    """

    every_steps: Count = 0
    asynchronous: bool = True
    on_error: Literal["warn", "stop"] = "warn"
    keep: Annotated[int, Field(le=MAX_COUNT)] = 2
    keep_every: Count = 0
    keep_best: Count = 0

    @field_validator("keep")
    @classmethod
    def _keeps_a_verified_one(cls, keep: int) -> int:
        if keep < 2:
            raise ValueError(
                f"keep={keep} must be at least 2: the previous checkpoint is deleted only "
                "after a new one has been verified, so one is never enough; set checkpoint.keep=2"
            )
        return keep

    @field_validator("keep_every")
    @classmethod
    def _names_saved_steps(cls, keep_every: int, info: ValidationInfo) -> int:
        every = info.data.get("every_steps")
        if not keep_every or every is None:
            return keep_every
        if every == 0:
            raise ValueError(
                f"keep_every={keep_every} keeps nothing: checkpoint.every_steps=0 saves at the end "
                "only; set checkpoint.every_steps to a divisor of it, or keep_every to 0"
            )
        if keep_every % every:
            nearest = (keep_every // every * every, -(-keep_every // every) * every)
            raise ValueError(
                f"keep_every={keep_every} is not a multiple of checkpoint.every_steps={every}, so "
                f"few such steps are saved; use {' or '.join(str(n) for n in nearest if n)}"
            )
        return keep_every


class LogSection(Section):
    """What is written while the run goes on; metrics.jsonl always is.

    Attributes:
        interval: steps between two lines of metrics.
        tensorboard: write TensorBoard events into the run's folder.
        wandb_project: also log to this project of Weights & Biases; null = do not.
        progress: show a line of progress where the console is a terminal.
    """

    interval: PositiveInt = 1
    tensorboard: bool = True
    wandb_project: Name | None = None
    progress: bool = True
