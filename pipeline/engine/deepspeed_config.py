"""The one file that writes DeepSpeed's keys.

DeepSpeed's defaults change between releases (gradient clipping became 1.0 in one of them), so every
value that this project depends on is written out, also where it equals today's default.
"""

import sys
from typing import Any

from pipeline.config.run_config import Device, Precision, RunConfig

MAX_LIVE_PARAMETERS = 1_000_000_000
_SUB_GROUP_SIZE = 1_000_000_000
# A sum of bf16 numbers over ranks is off by 0.3 % of the gradient at 8 ranks, 0.8 % at 64 and
# several percent at 512: from here on twice the traffic is the lesser cost.
FP32_REDUCTION_FROM_RANKS = 64


def deepspeed_config(
    config: RunConfig, *, data_parallel_size: int, precision: Precision, device: Device
) -> dict[str, Any]:
    """What deepspeed.initialize is given for a run.

    Args:
        config: The run.
        data_parallel_size: Ranks that each take their own samples.
        precision: Resolved arithmetic of the run.
        device: Resolved device of the run.

    Returns:
        A new mapping of plain values. Sizes are in elements unless DeepSpeed says otherwise.
    """
    accumulation = config.batch.accumulation
    level = optimizer_level(config.parallel.zero, precision)
    return {
        "train_batch_size": config.global_batch_size(data_parallel_size),
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        "gradient_clipping": config.optimizer.gradient_clipping if level else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": _reduce_precision(config, precision, data_parallel_size),
        # Gradients are added up over heads and micro-batches in fp32 at every level.
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {
            "enabled": precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "zero_optimization": _zero_optimization(config, level, device),
        # The optimizer is torch's AdamW, which DeepSpeed has not on its list for CPUs.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Progress and times are reported by this project, not by DeepSpeed.
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        # On by default, and then every forward waits for the whole GPU: a stage would wait for the
        # receive that it has posted ahead, whose sender waits for this stage.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "memory_breakdown": False,
        "dump_state": False,
    }


def optimizer_level(zero: int, precision: Precision) -> int:
    """The ZeRO level at which DeepSpeed keeps gradients and optimizer states.

    Without ZeRO it adds gradients of bf16 weights up in bf16 and nothing else: 256 micro-batches
    lose 1.6 %. Such runs keep whole weights and sum in fp32 as ZeRO-1 does.
    """
    return 1 if zero == 0 and precision == "bf16" else zero


def _reduce_precision(
    config: RunConfig, precision: Precision, data_parallel_size: int
) -> Precision:
    """What gradients are sent in; runs in fp32 send fp32."""
    wanted = config.parallel.reduce_precision
    if precision == "fp32" or wanted == "fp32":
        return "fp32"
    large = data_parallel_size >= FP32_REDUCTION_FROM_RANKS
    return "fp32" if wanted == "auto" and large else "bf16"


def _layer_parameters(config: RunConfig) -> int:
    """Of a layer's tensor-parallel part."""
    count = config.model.parameter_count()
    return count.trunk_layers // config.model.trunk_layers // config.parallel.tensor


def _zero_optimization(config: RunConfig, level: int, device: Device) -> dict[str, Any]:
    bucket = config.parallel.reduce_bucket_size
    return {
        "stage": level,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Streams exist on GPUs only; on a CPU there is nothing to overlap with. Below ZeRO-3
        # overlapping waits for the whole GPU in every backward (see "timers" above).
        "overlap_comm": device == "cuda" and level == 3,
        "reduce_bucket_size": bucket,
        # Below ZeRO-3 each rank gets the sums of its own partition; True would send all of them to
        # every rank, twice the traffic.
        "use_multi_rank_bucket_allreduce": False,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "sub_group_size": _SUB_GROUP_SIZE,
        # A layer is gathered while the one before it computes. Smaller buckets split it, and each
        # piece costs a launch.
        "stage3_prefetch_bucket_size": min(bucket, _layer_parameters(config)),
        # Norm weights stay whole on every rank, matrices never do: at any model size the same
        # parameters are partitioned, and a layer gathers its four matrices only.
        "stage3_param_persistence_threshold": config.model.hidden_size,
        "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
        "stage3_max_reuse_distance": MAX_LIVE_PARAMETERS,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "zero_hpz_partition_size": config.parallel.zero_hpz_partition_size,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "log_trace_cache_warnings": False,
    }
