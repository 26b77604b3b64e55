"""The one file that writes DeepSpeed's keys.

DeepSpeed's defaults change between releases (gradient clipping became 1.0 in one of them), so every
value that this project depends on is written out, also where it equals today's default.
"""

import sys
from typing import Any

from pipeline.config.run_config import Device, Precision, RunConfig

_PREFETCH_BUCKET_SIZE = 50_000_000
_MAX_LIVE_PARAMETERS = 1_000_000_000
_SUB_GROUP_SIZE = 1_000_000_000


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
    return {
        "train_batch_size": config.global_batch_size(data_parallel_size),
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        "managed_gradient_accumulation": True,
        "gradient_clipping": _clipping(config),
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": precision,
        "data_types": {"grad_accum_dtype": _accumulation_dtype(config.parallel.zero, precision)},
        "bf16": {
            "enabled": precision == "bf16",
            "immediate_grad_update": False,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "zero_optimization": _zero_optimization(config, device),
        # The optimizer is torch's AdamW, which DeepSpeed has not on its list for CPUs.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Progress and times are reported by this project, not by DeepSpeed.
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _clipping(config: RunConfig) -> float:
    """What DeepSpeed clips to; 0 without ZeRO, where the engine clips."""
    return config.optimizer.gradient_clipping if config.parallel.zero else 0.0


def _accumulation_dtype(zero_level: int, precision: Precision) -> Precision:
    """Type in which a parameter's gradients are added up over heads and micro-batches.

    ZeRO-3 adds into its partitions in fp32, at 4 bytes per parameter and data-parallel share.
    Below it bf16 runs add in bf16: without ZeRO nothing else is supported, and with ZeRO-1 fp32
    would select another optimizer class.
    """
    return "fp32" if zero_level == 3 else precision


def _zero_optimization(config: RunConfig, device: Device) -> dict[str, Any]:
    bucket = config.parallel.reduce_bucket_size
    return {
        "stage": config.parallel.zero,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Streams exist on GPUs only; on a CPU there is nothing to overlap with.
        "overlap_comm": device == "cuda",
        "reduce_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": True,
        "allgather_partitions": True,
        "allgather_bucket_size": bucket,
        "round_robin_gradients": False,
        "sub_group_size": _SUB_GROUP_SIZE,
        "stage3_prefetch_bucket_size": min(bucket, _PREFETCH_BUCKET_SIZE),
        # Norm weights stay whole on every rank, matrices never do: at any model size the same
        # parameters are partitioned, and a layer gathers its four matrices only.
        "stage3_param_persistence_threshold": config.model.hidden_size,
        "stage3_max_live_parameters": _MAX_LIVE_PARAMETERS,
        "stage3_max_reuse_distance": _MAX_LIVE_PARAMETERS,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "log_trace_cache_warnings": False,
    }
