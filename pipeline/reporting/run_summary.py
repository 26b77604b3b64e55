"""What a run comes to, before it starts: sizes, layout, cost, effective DeepSpeed values."""

import json
from typing import NamedTuple

from model.config import ModelConfig
from model.memory.sizes import MemorySizes
from model.operations.documents import takes_blocks
from model.structure.activation_memory import layer_activation_bytes
from pipeline.config.run_config import (
    Device,
    Precision,
    RunConfig,
    data_parallel_size,
    settings_without_effect,
    to_yaml,
)
from pipeline.engine.deepspeed_config import deepspeed_config
from pipeline.planning.parameters import part_parameters
from pipeline.planning.plan_text import memory_line
from pipeline.planning.run_plan import ELEMENT_BYTES, run_memory
from pipeline.stages.costs import predicted_idle, stage_costs
from pipeline.stages.plan import depths, layer_equivalents, num_depths, plan_text

_GRID_WIDTH = 8
_STATE_BYTES = 12  # of a trained parameter in a checkpoint: weight and both moments in fp32


class RunSummary(NamedTuple):
    """The resolved run as text for a person.

    Attributes:
        lines: sizes, layout and cost.
        deepspeed: what DeepSpeed is given, as JSON.
        config: the configuration, as YAML.
    """

    lines: list[str]
    deepspeed: str
    config: str

    def __str__(self) -> str:
        return "\n".join(
            [
                *self.lines,
                "DeepSpeed     effective values:",
                self.deepspeed,
                "configuration, resolved:",
                self.config,
            ]
        )


def summarize_run(
    config: RunConfig, *, world_size: int, device: Device, precision: Precision
) -> RunSummary:
    """What a run comes to.

    Args:
        config: the run.
        world_size: ranks it would have.
        device: resolved device.
        precision: resolved arithmetic.

    Raises:
        ConfigError: the world size does not fit the layout.
    """
    data_size = data_parallel_size(config, world_size)
    model, count = config.model, config.model.parameter_count()
    tokens = config.tokens_per_step(data_size)
    flops = config.flops_per_token
    settings = deepspeed_config(
        config, data_parallel_size=data_size, precision=precision, device=device
    )
    lines = [
        f"run           {config.run.name} in {config.run.dir}",
        f"parameters    {count.total:,} ({model.trunk_layers} trunk layers "
        f"{count.trunk_layers:,}, {model.future_tokens} heads {count.head_layers:,}, embedding "
        f"{count.embedding:,}, unembedding {count.unembedding:,}, final norm {count.final_norm:,})",
        f"layout        {world_size} ranks = {data_size} data x {config.parallel.tensor} tensor "
        f"x {len(config.stage_plan)} stages, ZeRO {config.parallel.zero}, {device}, {precision}",
        f"step          {tokens:,} tokens = {config.global_batch_size(data_size)} samples of "
        f"{config.data.sequence_length} (micro-batch {config.batch.micro_size}, accumulation "
        f"{config.batch.accumulation})",
        f"length        {config.last_step:,} of {config.steps:,} steps, "
        f"{tokens * config.last_step:,} tokens",
        f"checkpoint    {_STATE_BYTES * count.total / 2**30:.3g} GiB over all ranks"
        f"{', copied to their host memory first' if config.checkpoint.asynchronous else ''}",
        f"compute       {flops:.4g} FLOPs per token, {flops * tokens:.4g} per step, "
        f"{flops * tokens * config.last_step:.4g} for the run",
    ]
    if model.memory is not None:
        lines.insert(2, _remembering(model, model.memory, config.data.sequence_length))
    lines += _memory(config, world_size, device, precision)
    if config.data.document_mask:
        form = "torch's flex attention" if takes_blocks(device, model.head_dim) else "a bias"
        lines.append(
            f"documents     kept apart in attention (by {form}), positions and targets; FLOPs are "
            "counted as if each sequence were one text"
        )
    if len(config.stage_plan) > 1:
        lines += _stages(config, data_size)
    lines += [
        f"no effect     {line}"
        for line in settings_without_effect(config, data_parallel_size=data_size, device=device)
    ]
    return RunSummary(lines, json.dumps(settings, indent=2), to_yaml(config))


def _remembering(model: ModelConfig, sizes: MemorySizes, length: int) -> str:
    """What a memory adds, and how a sequence is run with it."""
    count = model.parameter_count()
    share = 100 * count.memory / (count.total - count.memory)
    per_loss = min(sizes.bptt + 1, sizes.num_segments(length))
    return (
        f"memory        {count.memory:,} of the parameters ({share:.3g} % more than without), "
        f"{sizes.num_segments(length)} segments of {sizes.segment}, {sizes.mode}, "
        f"{per_loss} at a time for backward"
    )


def _memory(config: RunConfig, world_size: int, device: Device, precision: Precision) -> list[str]:
    """What a rank of the stage that takes the most takes, and what is kept for backward there."""
    train = config.train
    memory = run_memory(config, world_size=world_size, device=device, precision=precision)
    layer = layer_activation_bytes(
        config.model,
        tokens=config.batch.micro_size * config.data.sequence_length,
        checkpointing=train.activation_checkpointing,
        tensor_size=config.parallel.tensor,
        element_bytes=ELEMENT_BYTES[precision],
    )
    kept = max(of_rank.activations for of_rank in memory)
    logits = max(of_rank.logits for of_rank in memory)
    # On a CPU what is never written, such as most of a bucket, takes no memory.
    whole = [f"memory        {memory_line(memory)}"] if device == "cuda" else []
    return [
        *whole,
        f"activations   {kept / 2**30:.3g} GiB on a rank at most, {layer / 2**30:.3g} GiB of them "
        f"for a layer (train.activation_checkpointing={train.activation_checkpointing})",
        f"loss          {train.chunk_tokens(device):,} tokens at a time (train.loss_chunk_tokens="
        f"{train.loss_chunk_tokens}), {logits / 2**30:.3g} GiB of logits and gradients",
    ]


def _stages(config: RunConfig, data_size: int) -> list[str]:
    """The grid of ranks, and what each stage holds, weighs and waits.

    Example of a grid, 2 stages x 2 data x 2 tensor:

        grid          stage x data x tensor, by rank
          stage 0     [0 1] [2 3]
          stage 1     [4 5] [6 7]
    """
    plan, tensor = config.stage_plan, config.parallel.tensor
    idle = predicted_idle(
        stage_costs(plan, config.model, recompute=config.train.activation_checkpointing == "full"),
        depths(plan, config.model),
        config.batch.accumulation,
    )
    lines = [f"stages        {plan_text(plan)}"]
    for number, part in enumerate(plan):
        lines.append(
            f"  stage {number:<6}{part.describe()}: {part_parameters(part, config.model):,} "
            f"parameters, {layer_equivalents(part, config.model):.2f} layer-equivalents, "
            f"predicted idle {idle[number]:.1%}"
        )
    lines.append(
        f"              a head weighs {config.model.head_layer_equivalents:.2f}, "
        f"{config.model.unembedding_layer_equivalents:.2f} of it for the unembedding; at most "
        f"{num_depths(plan, config.model)} micro-batches in flight"
    )
    lines.append(
        "grid          ranks by stage, [the tensor-parallel ones of each data-parallel one]"
    )
    for number in range(len(plan)):
        first = number * data_size * tensor
        groups = [range(first + d * tensor, first + (d + 1) * tensor) for d in range(data_size)]
        shown = [f"[{' '.join(map(str, group))}]" for group in groups]
        if data_size > _GRID_WIDTH:
            shown = [*shown[: _GRID_WIDTH - 1], "...", shown[-1]]
        lines.append(f"  stage {number:<6}{' '.join(shown)}")
    return lines
