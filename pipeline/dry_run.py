"""What a run comes to, before it starts: sizes, layout, cost, effective DeepSpeed values."""

import json

from model.documents import takes_blocks
from pipeline.config import (
    Device,
    Precision,
    RunConfig,
    data_parallel_size,
    settings_without_effect,
    to_yaml,
)
from pipeline.deepspeed_config import deepspeed_config


def describe(config: RunConfig, *, world_size: int, device: Device, precision: Precision) -> str:
    """The resolved run as text for a person.

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
        f"x {config.parallel.stages} stages, ZeRO {config.parallel.zero}, {device}, {precision}",
        f"step          {tokens:,} tokens = {config.global_batch_size(data_size)} samples of "
        f"{config.data.sequence_length} (micro-batch {config.batch.micro_size}, accumulation "
        f"{config.batch.accumulation})",
        f"length        {config.last_step:,} of {config.train.steps:,} steps, "
        f"{tokens * config.last_step:,} tokens",
        f"compute       {flops:.4g} FLOPs per token, {flops * tokens:.4g} per step, "
        f"{flops * tokens * config.last_step:.4g} for the run",
    ]
    if config.data.document_mask:
        form = "torch's flex attention" if takes_blocks(device, model.head_dim) else "a bias"
        lines.append(
            f"documents     kept apart in attention (by {form}), positions and targets; FLOPs are "
            "counted as if each row were one text"
        )
    lines += [
        f"no effect     {line}"
        for line in settings_without_effect(config, data_parallel_size=data_size, device=device)
    ]
    return "\n".join(
        [
            *lines,
            "DeepSpeed     effective values:",
            json.dumps(settings, indent=2),
            "configuration, resolved:",
            to_yaml(config),
        ]
    )
