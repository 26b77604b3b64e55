"""DeepSpeed's keys: checked against the installed DeepSpeed, and explicit where it matters."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.config.run_config import Device, Precision, RunConfig, load_config
from pipeline.engine.deepspeed_config import deepspeed_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def keys(*overrides: str, precision: Precision = "fp32", device: Device = "cpu") -> dict[str, Any]:
    """DeepSpeed's keys for the quickstart with these overrides, on one data-parallel rank."""
    config: RunConfig = load_config(QUICKSTART, overrides)
    return deepspeed_config(config, data_parallel_size=1, precision=precision, device=device)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_reads_the_values_that_were_written(zero: int, precision: Precision) -> None:
    """The installed DeepSpeed accepts the keys and takes over each value."""
    written = keys(
        f"parallel.zero={zero}",
        "batch.micro_size=3",
        "batch.accumulation=2",
        "optimizer.gradient_clipping=0.5",
        "parallel.reduce_bucket_size=1000",
        precision=precision,
    )
    read = DeepSpeedConfig(written)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (6, 3)
    assert read.gradient_accumulation_steps == 2
    level = written["zero_optimization"]["stage"]
    assert read.gradient_clipping == (0.5 if level else 0.0)  # without ZeRO the engine clips
    assert read.zero_config.stage == level
    assert read.zero_config.reduce_bucket_size == 1000
    assert read.zero_config.prefetch_bucket_size == 1000
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert not read.float16_config.enabled
    assert read.zero_allow_untested_optimizer
    assert not read.wall_clock_breakdown
    assert read.steps_per_print > 10**15


def test_every_key_is_one_that_deepspeed_knows() -> None:
    """DeepSpeed ignores unknown top-level keys silently, so each must be one of its constants."""
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {"zero_optimization", "bf16", "fp16", "timers"}
    assert set(keys()) <= known
    fields = DeepSpeedZeroConfig.model_fields
    zero_names = set(fields) | {field.alias for field in fields.values() if field.alias}
    assert set(keys()["zero_optimization"]) <= zero_names


@pytest.mark.parametrize("stages", ["1", "auto:2"])
def test_communication_overlaps_where_nothing_waits_for_the_device(stages: str) -> None:
    """overlap_comm needs streams; below ZeRO-3 it would wait for the whole GPU in each backward."""
    for zero, overlaps in ((1, False), (2, False), (3, True)):
        written = keys(f"parallel.zero={zero}", f"parallel.stages={stages}", device="cuda")
        assert written["zero_optimization"]["overlap_comm"] is overlaps
    assert keys(device="cpu")["zero_optimization"]["overlap_comm"] is False


def test_the_timer_that_waits_for_the_device_is_off() -> None:
    """It is on by default, synchronized."""
    read = DeepSpeedConfig(keys(device="cuda"))
    assert not read.timers_config.enabled
    assert not read.timers_config.synchronized


def test_zero_3_gathers_a_layer_ahead() -> None:
    """Its size comes from the model; a smaller bucket for reducing bounds it."""
    written = keys("parallel.reduce_bucket_size=500000000")["zero_optimization"]
    model = load_config(QUICKSTART, []).model
    layer = model.parameter_count().head_layers // model.future_tokens
    assert written["stage3_prefetch_bucket_size"] == layer
    assert (
        keys("parallel.reduce_bucket_size=1000")["zero_optimization"]["stage3_prefetch_bucket_size"]
        == 1000
    )


def test_clipping_off_is_written_as_zero() -> None:
    """DeepSpeed's default would clip at 1.0, so 0 is written out."""
    assert keys("optimizer.gradient_clipping=0")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_added_up_in_fp32(zero: int, precision: Precision) -> None:
    """At every level; without ZeRO DeepSpeed refuses a mix, so bf16 runs step as level 1 does."""
    written = keys(f"parallel.zero={zero}", precision=precision)
    assert DeepSpeedConfig(written).grad_accum_dtype == "fp32"
    level = 1 if (zero, precision) == (0, "bf16") else zero
    assert written["zero_optimization"]["stage"] == level


@pytest.mark.parametrize(
    ("wanted", "ranks", "precision", "expected"),
    [
        ("auto", 63, "bf16", "bf16"),
        ("auto", 64, "bf16", "fp32"),
        ("bf16", 512, "bf16", "bf16"),
        ("fp32", 2, "bf16", "fp32"),
        ("bf16", 2, "fp32", "fp32"),
    ],
)
def test_what_ranks_add_gradients_up_in(
    wanted: str, ranks: int, precision: Precision, expected: str
) -> None:
    """`parallel.reduce_precision`: fp32 by default from 64 ranks on, and in fp32 runs always."""
    config = load_config(QUICKSTART, [f"parallel.reduce_precision={wanted}"])
    written = deepspeed_config(config, data_parallel_size=ranks, precision=precision, device="cuda")
    assert written["communication_data_type"] == expected


def test_batch_covers_all_data_parallel_ranks() -> None:
    """train_batch_size is micro_size * accumulation * data-parallel size."""
    config = load_config(QUICKSTART, ["batch.micro_size=4", "batch.accumulation=3"])
    written = deepspeed_config(config, data_parallel_size=8, precision="fp32", device="cpu")
    assert written["train_batch_size"] == 96
