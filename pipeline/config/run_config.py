"""The configuration of a run: its sections, and the file they come from.

One YAML file is one run. Values are never changed after they were read; what depends on the machine
(device, precision, data-parallel size) is a function of the configuration and of that machine.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from foundation.yaml_text import YamlError, dump_yaml, parse_yaml, read_yaml
from model.config import ModelConfig
from model.errors import ConfigError
from model.structure.freezing import heads_trained_alone
from model.structure.part import ModelPart
from pipeline.config.data_section import DataSection
from pipeline.config.problems import MOST_PROBLEMS, listed, plain_problems, shown, unknown_key
from pipeline.config.rules import problems_between
from pipeline.config.sections import (
    BatchSection,
    CheckpointSection,
    EvalSection,
    LogSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    ScheduleSection,
    Section,
    TrainSection,
)
from pipeline.config.versions import (
    CONFIG_VERSION,
    VERSION_KEY,
    leave_out_unknown,
    of_this_version,
)
from pipeline.stages.plan import num_stages, stage_plan

# Keys whose value is itself a mapping; overrides set it whole, or one key within it.
_MAPPINGS = ("data.review", "data.weights", "model.rope_scaling", "model.memory")

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]


class RunConfig(Section):
    """One run."""

    run: RunSection
    model: ModelConfig
    data: DataSection
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    batch: BatchSection
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    eval: EvalSection = Field(default_factory=EvalSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        if problems := problems_between({name: getattr(self, name) for name in _sections()}):
            raise ValueError("\n".join(problems))
        return self

    @property
    def steps(self) -> int:
        """Steps of the whole run; those that follow from data.review have been filled in."""
        assert self.train.steps is not None, "pipeline.review.schedule.with_steps comes first"
        return self.train.steps

    @property
    def last_step(self) -> int:
        """The step after which this run stops: train.stop_at_step, else the last one."""
        return self.train.stop_at_step or self.steps

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of one training step per input token."""
        return self.model.flops_per_token(
            self.data.sequence_length,
            trained_heads=heads_trained_alone(self.model.future_tokens, self.train.freeze),
        )

    @property
    def stage_plan(self) -> tuple[ModelPart, ...]:
        """What each pipeline stage holds of the model, first stage first."""
        return stage_plan(self.parallel.stages, self.model)

    @property
    def compile_choice(self) -> bool | Literal["auto"]:
        """`train.compile`, but auto = false in a deterministic run and with several stages."""
        # torch.compile times several kernels and takes the fastest; each adds up in its own order.
        # A kernel is loaded at its first launch, which may wait for the whole GPU: for receives
        # that a stage has posted ahead, whose sender waits for this stage.
        unfit = self.train.deterministic or len(self.stage_plan) > 1
        return False if self.train.compile == "auto" and unfit else self.train.compile

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.batch.micro_size * self.batch.accumulation * data_parallel_size

    def tokens_per_step(self, data_parallel_size: int) -> int:
        """Input tokens of one optimizer step over all ranks."""
        return self.global_batch_size(data_parallel_size) * self.data.sequence_length


def _sections() -> dict[str, type[BaseModel]]:
    """The class of each section, in the order of the file."""
    kinds = {}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type), f"section {name} is {field.annotation}"
        assert issubclass(field.annotation, BaseModel), f"section {name} is {field.annotation}"
        kinds[name] = field.annotation
    return kinds


def known_keys() -> list[str]:
    """Every key of a run configuration, as `section.key`."""
    return [f"{name}.{key}" for name, kind in _sections().items() for key in kind.model_fields]


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    left_out: Callable[[str], None] | None = None,
) -> RunConfig:
    """Read a run configuration.

    Args:
        path: The YAML file.
        overrides: `section.key=value` each, the value in YAML; a later one wins. Within a mapping
            `section.key.name=value` sets one of its keys.
        left_out: Told of each unknown key, which is then left out; None = unknown keys are errors.
            Those of the model are errors anyhow, since they may make it another one.

    Raises:
        ConfigError: With every problem of file and overrides, one line each.
    """
    raw = of_this_version(path, _read_mapping(Path(path)))
    if left_out is not None:
        for key in leave_out_unknown(raw, _sections(), always_known=("model",)):
            left_out(key)
    problems = [problem for text in overrides if (problem := _apply_override(raw, text))]
    keys = known_keys()
    unknown = [str(name) for name in raw if name not in _sections()]
    problems += [unknown_key(name, keys) for name in unknown[:MOST_PROBLEMS]]
    sections: dict[str, BaseModel] = {}
    for name, kind in _sections().items():
        values = raw.get(name)
        try:
            sections[name] = kind.model_validate({} if values is None else values)
        except ValidationError as error:
            problems += plain_problems(name, error, keys)
    problems += problems_between(sections)
    if problems:
        raise ConfigError(f"{path}: {listed(problems)}")
    return RunConfig.model_validate(sections)


def _read_mapping(path: Path) -> dict[Any, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a run's YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a YAML file") from None
    except YamlError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    names = ", ".join(_sections())
    if content is None:
        raise ConfigError(f"{path} is empty; a run needs the sections {names}")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a mapping of sections; a run needs the sections {names}")
    return content


def _apply_override(raw: dict[Any, Any], text: str) -> str | None:
    """Set one value in the mapping that was read; what is wrong with the override, if anything."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"--set {shown(text)} must look like section.key=value, e.g. train.steps=100"
    mapping = next((name for name in _MAPPINGS if key.startswith(f"{name}.")), None)
    if (mapping or key) not in known_keys():
        return f"--set {unknown_key(key, known_keys())}"
    try:
        value = parse_yaml(value_text)
    except YamlError as error:
        given = shown(value_text)[1:-1]
        return f"--set {key}={given}: the value is not valid YAML ({error}); quote it as text"
    if isinstance(value, dict) and key not in _MAPPINGS:
        return (
            f"--set {shown(text)[1:-1]}: the value must be one value or a list; set the keys one "
            "by one"
        )
    section, _, name = (mapping or key).partition(".")
    current = raw.get(section)
    if current is None or isinstance(current, dict):
        current = current or {}
        if mapping is not None:
            before = current.get(name)
            within = before if isinstance(before, dict) else {}
            value = {**within, key.removeprefix(f"{mapping}."): value}
        raw[section] = {**current, name: value}
    return None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, every key written out; loads back to an equal one."""
    return dump_yaml({VERSION_KEY: CONFIG_VERSION, **config.model_dump(mode="json")})


def world_problems(config: RunConfig, world_size: int) -> list[str]:
    """What keeps this run from using `world_size` ranks; empty when it can."""
    tensor, stages = config.parallel.tensor, num_stages(config.parallel.stages)
    copy = tensor * stages  # ranks that hold the model once
    if world_size % copy == 0:
        return _copy_problems(config, world_size // copy)
    below, above = world_size // copy * copy, -(-world_size // copy) * copy
    counts = " or ".join(str(count) for count in (below, above) if count)
    if stages == 1:
        return [
            f"parallel.tensor={tensor} does not divide the world size of {world_size} ranks; "
            f"start {counts} ranks, or set parallel.tensor to a divisor of {world_size}"
        ]
    return [
        f"{stages} stages (parallel.stages) x parallel.tensor={tensor} = {copy} ranks do not "
        f"divide the world size of {world_size} ranks; start {counts} ranks, or choose stages and "
        f"parallel.tensor whose product divides {world_size}"
    ]


def _copy_problems(config: RunConfig, data_size: int) -> list[str]:
    size = config.parallel.zero_hpz_partition_size
    if data_size % size == 0:
        return []
    return [
        f"parallel.zero_hpz_partition_size={size} does not divide the {data_size} data-parallel "
        f"ranks; set it to a divisor of {data_size}, such as the GPUs of a node divided by "
        f"parallel.tensor={config.parallel.tensor}"
    ]


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks that each take their own samples: world size / (stages * parallel.tensor).

    Raises:
        ConfigError: The world size cannot be divided.
    """
    if problems := world_problems(config, world_size):
        raise ConfigError("; ".join(problems))
    return world_size // (config.parallel.tensor * num_stages(config.parallel.stages))


def resolve_device(config: RunConfig, cuda_available: bool) -> Device:
    """The kind of device this run uses on this machine.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    wanted = config.train.device
    if wanted == "cuda" and not cuda_available:
        raise ConfigError(
            "train.device=cuda, but this process sees no CUDA device; run it on a GPU machine "
            "(check nvidia-smi and CUDA_VISIBLE_DEVICES) or set train.device=cpu"
        )
    if wanted == "auto":
        return "cuda" if cuda_available else "cpu"
    return wanted


def resolve_precision(config: RunConfig, device: Device, bf16_supported: bool = True) -> Precision:
    """The arithmetic of this run: auto is bf16 on a GPU that has it, else fp32.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    wanted = config.train.precision
    if wanted == "auto":
        return "bf16" if device == "cuda" and bf16_supported else "fp32"
    if wanted == "bf16" and device == "cuda" and not bf16_supported:
        raise ConfigError(
            "train.precision=bf16, but this GPU has no bf16 arithmetic; set train.precision=fp32 "
            "or use a GPU of the Ampere generation or later"
        )
    return wanted


def settings_without_effect(
    config: RunConfig, *, data_parallel_size: int, device: Device
) -> list[str]:
    """Settings that change nothing in this run, one line each, to be reported at its start."""
    lines = []
    zero, last_step = config.parallel.zero, config.last_step
    if zero and data_parallel_size == 1:
        lines.append(f"parallel.zero={zero}: there is 1 data-parallel rank, nothing to divide")
    for key, every in (
        ("eval.every_steps", config.eval.every_steps),
        ("checkpoint.every_steps", config.checkpoint.every_steps),
        ("checkpoint.keep_every", config.checkpoint.keep_every),
    ):
        if every > last_step:
            lines.append(f"{key}={every}: the run stops at step {last_step}")
    if config.eval.every_steps == 0 and "samples" in config.eval.model_fields_set:
        lines.append(f"eval.samples={config.eval.samples}: eval.every_steps=0, no validation")
    warmup, steps = config.schedule.warmup_steps, config.steps
    if warmup >= steps:
        lines.append(
            f"optimizer.learning_rate={config.optimizer.learning_rate}: warm-up over "
            f"schedule.warmup_steps={warmup} does not reach it within train.steps={steps}"
        )
    if config.batch.accumulation < len(config.stage_plan):
        lines.append(
            f"parallel.stages: only {config.batch.accumulation} of {len(config.stage_plan)} stages "
            f"can work at a time with batch.accumulation={config.batch.accumulation}; use at least "
            f"{4 * len(config.stage_plan)}"
        )
    if config.model.future_tokens == 1 and config.train.head_backward == "joint":
        lines.append("train.head_backward=joint: with 1 head it is the same as sequential")
    if config.train.freeze == "trunk" and config.model.head_weights is not None:
        first = config.model.loss_weights(0)[0]
        lines.append(
            f"model.head_weights[0]={first:g}: train.freeze=trunk, head 1 is only measured"
        )
    if (review := config.data.review) is not None:
        lines += review.without_effect()
    if config.train.init_heads == "fresh" and config.train.init_from is None:
        lines.append("train.init_heads=fresh: train.init_from=null, all of the model is fresh")
    if device == "cpu" and config.train.attention != "auto":
        lines.append(f"train.attention={config.train.attention}: on a CPU torch chooses")
    if device == "cpu" and config.train.precision == "bf16":
        lines.append("train.precision=bf16: on a CPU it saves memory, but no time")
    return lines
