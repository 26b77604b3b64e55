"""What a configuration chooses by the machine and the layout, and what has no effect there."""

from pathlib import Path
from typing import Literal

import pytest

from model.errors import ConfigError
from pipeline.config.run_config import (
    data_parallel_size,
    load_config,
    resolve_device,
    resolve_precision,
    settings_without_effect,
    to_yaml,
    world_problems,
)
from tests.pipeline.config.conftest import refusal


def test_data_parallel_size_follows_from_the_world(small: Path) -> None:
    """World size over tensor size; a world that does not divide is refused with a remedy."""
    config = load_config(small, ["parallel.tensor=4"])
    assert data_parallel_size(config, 8) == 2
    assert world_problems(config, 8) == []
    assert config.global_batch_size(2) == 4
    assert config.tokens_per_step(2) == 128
    (line,) = world_problems(config, 6)
    assert "parallel.tensor=4" in line
    assert "start 4 or 8 ranks" in line
    assert "start 4 ranks" in world_problems(config, 2)[0]
    with pytest.raises(ConfigError, match="world size of 6"):
        data_parallel_size(config, 6)


def test_device_and_precision_follow_from_the_machine(small: Path) -> None:
    """Auto takes CUDA and bf16 where they are; the configuration itself is not changed."""
    config = load_config(small)
    assert resolve_device(config, cuda_available=True) == "cuda"
    assert resolve_device(config, cuda_available=False) == "cpu"
    assert resolve_precision(config, "cuda") == "bf16"
    assert resolve_precision(config, "cuda", bf16_supported=False) == "fp32"
    assert resolve_precision(config, "cpu") == "fp32"
    assert (config.train.device, config.train.precision) == ("auto", "auto")


def test_device_or_precision_that_is_not_there_is_refused(small: Path) -> None:
    """CUDA without a GPU and bf16 on a GPU without it are the user's to fix."""
    cuda = load_config(small, ["train.device=cuda", "train.precision=bf16"])
    with pytest.raises(ConfigError, match=r"train\.device=cuda.*set train\.device=cpu"):
        resolve_device(cuda, cuda_available=False)
    with pytest.raises(ConfigError, match=r"set train\.precision=fp32"):
        resolve_precision(cuda, "cuda", bf16_supported=False)
    assert resolve_precision(cuda, "cuda") == "bf16"


def test_settings_without_effect_are_said(small: Path) -> None:
    """ZeRO on one rank, intervals past the end, samples that are never used."""
    overrides = ["eval.samples=8", "checkpoint.every_steps=60", "train.stop_at_step=50"]
    lines = settings_without_effect(
        load_config(small, overrides), data_parallel_size=1, device="cpu"
    )
    assert [line.split("=")[0] for line in lines] == [
        "parallel.zero",
        "checkpoint.every_steps",
        "eval.samples",
    ]
    assert settings_without_effect(load_config(small), data_parallel_size=2, device="cpu") == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.freeze=trunk"], "train.freeze=trunk would train heads on a model that was never"),
        (
            ["train.freeze=trunk", "train.init_from=llama", "model.future_tokens=1"],
            "train.freeze=trunk leaves nothing to train with model.future_tokens=1",
        ),
    ],
)
def test_freezing_needs_a_trained_model_and_heads_to_train(
    small: Path, settings: list[str], words: str
) -> None:
    """A frozen trunk that nobody trained, or nothing left to train, is refused."""
    (line,) = refusal(small, *settings)
    assert line.startswith(words)


def test_weight_of_a_frozen_head_has_no_effect(small: Path) -> None:
    """Head 1 belongs to the frozen model: its weight moves the reported loss and nothing else."""
    settings = ["train.freeze=trunk", "train.init_from=llama", "model.head_weights=[3, 1, 1, 1]"]
    lines = settings_without_effect(
        load_config(small, settings), data_parallel_size=2, device="cpu"
    )
    assert lines == ["model.head_weights[0]=3: train.freeze=trunk, head 1 is only measured"]


def test_chunks_of_the_loss_follow_the_device_unless_a_number_is_given(small: Path) -> None:
    """The default is auto; the resolved YAML keeps what was asked for."""
    config = load_config(small)
    assert config.train.loss_chunk_tokens == "auto"
    assert (config.train.chunk_tokens("cuda"), config.train.chunk_tokens("cpu")) == (4096, 1024)
    config = load_config(small, ["train.loss_chunk_tokens=512"])
    assert (config.train.chunk_tokens("cuda"), config.train.chunk_tokens("cpu")) == (512, 512)
    small.write_text(to_yaml(config))
    assert load_config(small) == config


@pytest.mark.parametrize("value", ["0", "-1", "all", "1.5", "true", "null"])
def test_other_chunks_are_refused_in_one_line(small: Path, value: str) -> None:
    """With what auto stands for."""
    (line,) = refusal(small, f"train.loss_chunk_tokens={value}")
    assert line.startswith("train.loss_chunk_tokens=")
    assert "must be auto or a whole number above 0; auto is 4096 on a GPU and 1024" in line


def test_attention_has_no_effect_on_a_cpu(small: Path) -> None:
    """It is said at the start; a name that is no kernel is refused with those that are."""
    config = load_config(small, ["train.attention=flash"])

    def lines(device: Literal["cpu", "cuda"]) -> list[str]:
        found = settings_without_effect(config, data_parallel_size=2, device=device)
        return [line for line in found if "attention" in line]

    assert lines("cpu") == ["train.attention=flash: on a CPU torch chooses"]
    assert lines("cuda") == []
    (line,) = refusal(small, "train.attention=fast")
    assert "use one of: auto, cudnn, flash, efficient or math" in line


@pytest.mark.parametrize("setting", ["train.deterministic=true", "parallel.stages=auto:2"])
def test_some_runs_compile_nothing_unless_they_are_told_to(small: Path, setting: str) -> None:
    """Compiled kernels are chosen by timing them, and loaded when they are first launched."""
    assert load_config(small).compile_choice == "auto"
    assert load_config(small, [setting]).compile_choice is False
    assert load_config(small, [setting, "train.compile=true"]).compile_choice is True
    (line,) = refusal(small, "train.compile=sometimes")
    assert 'compile="sometimes" must be auto, true or false' in line
