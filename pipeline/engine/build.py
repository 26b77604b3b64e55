"""Builds this rank's engine: its part of the model, DeepSpeed around it, the way it executes."""

import contextlib
import functools
import os
from typing import Any

import deepspeed
import torch

from model.errors import TrainingError
from model.hugging_face.importing import ImportedWeights
from model.language_model import MultiTokenModel
from model.layers import transformer_engine_available
from model.operations.kernels import choose_kernels
from model.structure.freezing import freeze_parameters, is_trained
from model.structure.part import ModelPart
from pipeline.checkpoint.coverage import Extent, coverage_problems
from pipeline.config.run_config import Precision, RunConfig
from pipeline.distributed.agreement import judged_by_main
from pipeline.distributed.topology import Topology
from pipeline.engine.deepspeed_config import deepspeed_config, optimizer_level
from pipeline.engine.deepspeed_internals import (
    add_gradients_in_one_pass,
    fp32_sums_at_level_1,
    gather_weights_within,
    keep_off_shared_memory,
    share_of,
)
from pipeline.engine.engine import Engine, Execution
from pipeline.engine.optimizer import build_adamw
from pipeline.engine.pipeline_stage import PipelineStage
from pipeline.engine.single_stage import SingleStage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_engine(
    config: RunConfig,
    topology: Topology,
    precision: Precision,
    imported: ImportedWeights | None = None,
) -> Engine:
    """The engine of this rank, of the whole model or of its stage; a collective.

    Args:
        config: the run.
        topology: the grid of ranks.
        precision: arithmetic of weights and activations.
        imported: initial weights from elsewhere (`model.hugging_face`); None = all fresh.

    Raises:
        ConfigError: this version of DeepSpeed is not supported, this GPU has not the attention that
            `train.attention` names, or `train.compile` finds no compiler.
        TrainingError: what the ranks would save does not cover the model.
    """
    settings = deepspeed_config(
        config,
        data_parallel_size=topology.data_size,
        precision=precision,
        device="cuda" if topology.device.type == "cuda" else "cpu",
    )
    _prepare_communication(topology)
    dtype = DTYPES[precision]
    model = _build_model(config, topology, dtype, settings, imported)
    choose_kernels(
        model,
        config.train.attention,
        topology.device,
        compile_elementwise=config.compile_choice,
    )
    with fp32_sums_at_level_1():
        wrapped, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(model, config.optimizer),
            mpu=topology,
            config=settings,
            dist_init_required=False,
        )
    add_gradients_in_one_pass(wrapped, is_compiled=model.compiles_kernels)
    share = share_of(
        wrapped,
        level=optimizer_level(config.parallel.zero, precision),
        data_rank=topology.data_rank,
        data_size=topology.data_size,
    )
    execution: Execution
    if topology.num_stages > 1:
        execution = PipelineStage(config, topology, wrapped, share, dtype)
    else:
        execution = SingleStage(config, wrapped, topology.device)
    engine = Engine(config, topology, wrapped, share, execution)
    check_coverage(engine)
    return engine


def check_coverage(engine: Engine) -> None:
    """See that the shares of all ranks hold every weight and moment exactly once; a collective.

    Raises:
        TrainingError: they do not, so that no checkpoint could be relied on.
    """
    config = engine.config

    def judge(shares: list[list[Extent]]) -> None:
        problems = coverage_problems(
            (extent for share in shares for extent in share),
            config.model,
            tensor_size=engine.topology.tensor_size,
            trained=functools.partial(is_trained, freeze=config.train.freeze),
        )
        if problems:
            raise TrainingError(
                f"the ranks' shares of weights and optimizer states are not the model's: "
                f"{'; '.join(problems[:3])}; nothing was started, since no checkpoint could be "
                f"resumed: install the DeepSpeed that constraints.txt names (this is "
                f"{deepspeed.__version__}) and report the layout"
            )

    judged_by_main(engine.snapshot().extents(), judge, TrainingError)


def _build_model(
    config: RunConfig,
    topology: Topology,
    dtype: torch.dtype,
    settings: dict[str, Any],
    imported: ImportedWeights | None,
) -> MultiTokenModel:
    partitioned = config.parallel.zero == 3
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if partitioned:
        neighbors = topology.neighbors(config.parallel.zero_hpz_partition_size)
        gather_weights_within(neighbors)
        context = deepspeed.zero.Init(
            data_parallel_group=topology.get_data_parallel_group(),
            config_dict_or_path=settings,
            zero_param_parallel_group=neighbors,
            dtype=None,  # from the settings; given here, a CPU without fp16 turns it into bf16
            mpu=topology,
        )
    with context:
        model = MultiTokenModel(
            config.model,
            dtype=dtype,
            activation_checkpointing=config.train.activation_checkpointing,
            transformer_engine=_uses_transformer_engine(config, topology),
            part=_part(config, topology),
        )
    if not partitioned:
        model.to(topology.device)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
            if not partitioned or topology.data_rank == 0:
                fresh = functools.partial(
                    model.initial_weight, name, parameter.shape, config.run.seed
                )
                parameter.data.copy_(imported(name, fresh) if imported else fresh())
    freeze_parameters(model, config.train.freeze)
    return model


def _part(config: RunConfig, topology: Topology) -> ModelPart:
    """What this rank's stage holds of the model."""
    return topology.plan[topology.stage] if topology.plan else ModelPart.whole(config.model)


def _uses_transformer_engine(config: RunConfig, topology: Topology) -> bool:
    wanted = config.train.transformer_engine and topology.device.type == "cuda"
    return wanted and transformer_engine_available()


def _prepare_communication(topology: Topology) -> None:
    """Let DeepSpeed use the process group that exists."""
    os.environ["LOCAL_RANK"] = str(topology.device.index or 0)
    if topology.device.type == "cpu":  # on a GPU the list of ops would be probed for nothing
        keep_off_shared_memory()
    deepspeed.init_distributed(dist_init_required=False)
