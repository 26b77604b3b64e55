"""A run's layout with a small model and random tokens, for a step that tries it out.

Legend: B batch, S sequence, n heads.
"""

from typing import Any, Literal

import torch

from data_prep.loading.loader import Batch
from model.config import ModelConfig
from model.memory.sizes import MemorySizes
from model.structure.part import ModelPart, span_text
from pipeline.config.run_config import Precision, RunConfig

Width = Literal["tiny", "own"]
_LAYERS_OF_ONE_STAGE = 2
_HEAD_WIDTH, _TINY_LENGTH, _TINY_CHUNK, _TINY_BUCKET = 16, 32, 16, 100_000
_SEED = 7


def trial_config(config: RunConfig, width: Width, precision: Precision) -> RunConfig:
    """The run with as few layers as its stages allow, and nothing to read.

    Args:
        config: the run.
        width: `tiny` = a few kilobytes a layer and no clipping, of the same heads; `own` = the
            run's own sizes but for the layers.
        precision: arithmetic of the run.
    """
    stages, trunk = _shrunk_stages(config.stage_plan)
    in_heads = config.model.layers - config.model.trunk_layers
    model = config.model.model_dump() | {"layers": trunk + in_heads}
    values: dict[str, Any] = config.model_dump()
    values["parallel"]["stages"] = stages
    values["train"] |= {"steps": 2, "stop_at_step": None, "precision": precision}
    values["train"] |= {"freeze": "none", "init_from": None}
    values["schedule"] = {"warmup_steps": 0}
    values["data"]["document_mask"] = False
    values["eval"], values["checkpoint"] = {}, {}
    micro_batches = 2 * len(config.stage_plan)
    values["batch"] = {"micro_size": config.batch.micro_size, "accumulation": micro_batches}
    if width == "tiny":
        model |= _tiny_sizes(config.model, config.parallel.tensor)
        if config.model.memory is not None:
            model["memory"] = _tiny_memory(config.model.memory)
        values["batch"]["micro_size"] = 1
        length = max(_TINY_LENGTH, config.model.future_tokens + 1)
        values["data"]["sequence_length"] = length
        values["train"]["loss_chunk_tokens"] = _TINY_CHUNK
        values["parallel"]["reduce_bucket_size"] = _TINY_BUCKET
        values["optimizer"]["gradient_clipping"] = 0.0
    return RunConfig.model_validate(values | {"model": model})


def one_process_config(trial: RunConfig) -> RunConfig:
    """The same model in one process, in fp32 on a CPU, with nothing divided."""
    values = trial.model_dump()
    values["parallel"] |= {"tensor": 1, "stages": 1, "zero": 0, "zero_hpz_partition_size": 1}
    values["train"] |= {"device": "cpu", "precision": "fp32", "activation_checkpointing": "none"}
    return RunConfig.model_validate(values)


def trial_batches(config: RunConfig, step: int, data_rank: int, data_size: int) -> list[Batch]:
    """A rank's micro-batches of random tokens, dealt as the loader deals samples.

    One process that is given `data_size` times as many micro-batches gets all of them.
    """
    heads, length = config.model.future_tokens, config.data.sequence_length
    micro, count = config.batch.micro_size, config.batch.accumulation
    generator = torch.Generator().manual_seed(_SEED + step)
    shape = (micro * count * data_size, length + heads)
    window = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    labels = torch.stack([window[:, k : k + length] for k in range(1, heads + 1)])
    starts = [(number * data_size + data_rank) * micro for number in range(count)]
    return [
        Batch(window[s : s + micro, :length].contiguous(), labels[:, s : s + micro].contiguous())
        for s in starts
    ]


def _shrunk_stages(plan: tuple[ModelPart, ...]) -> tuple[Any, int]:
    """The same stages with one trunk layer where they have any; and how many layers that is."""
    if len(plan) == 1:
        return 1, _LAYERS_OF_ONE_STAGE
    stages, trunk = [], 0
    for part in plan:
        stage: dict[str, Any] = {}
        if part.trunk_layers:
            stage["trunk"] = str(trunk)
            trunk += 1
        if part.heads:
            stage["heads"] = span_text(part.heads)
        stages.append(stage)
    return tuple(stages), trunk


def _tiny_sizes(model: ModelConfig, tensor_size: int) -> dict[str, Any]:
    """Sizes that tensor parallelism divides; queries still share keys if they did."""
    queries = 2 if model.kv_heads < model.attention_heads else 1
    heads = 2 * tensor_size * queries
    return {
        "attention_heads": heads,
        "kv_heads": heads // queries,
        "hidden_size": heads * _HEAD_WIDTH,
        "ffn_hidden_size": 64 * tensor_size,
        "vocab_size": 128 * tensor_size,
    }


def _tiny_memory(sizes: MemorySizes) -> dict[str, Any]:
    """A memory of the same kind, for several windows of a tiny sequence."""
    segment = _TINY_LENGTH // 4
    tiny = {"segment": segment, "summary": segment // 2, "cache": 2, "width": None, "bptt": 1}
    return sizes.model_dump() | tiny | {"sensory": min(sizes.sensory, segment // 4)}
