"""What is set before CUDA starts, what is not set again, and what a GPU is not asked for."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.cuda_settings import prepare_cuda
from pipeline.distributed.meeting import start_process_group
from pipeline.distributed.rendezvous import RankInfo
from pipeline.distributed.topology import Topology
from pipeline.engine import build
from tests.support.engine_cases import Case, build_topology, engine_config
from tests.support.harness import run_ranks

GPU: Any = SimpleNamespace(device=torch.device("cuda", 0))
CPU: Any = SimpleNamespace(device=torch.device("cpu"))


def test_defaults_and_what_the_user_has_set() -> None:
    """Expandable segments always, eager loading for stages, cuBLAS's workspace on request."""
    plain: dict[str, str] = {}
    prepare_cuda(plain, stages=1, deterministic=False)
    assert plain == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    full: dict[str, str] = {}
    prepare_cuda(full, stages=2, deterministic=True)
    assert full == plain | {"CUDA_MODULE_LOADING": "EAGER", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    users = {
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "CUDA_MODULE_LOADING": "LAZY",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    }
    kept = dict(users)
    prepare_cuda(kept, stages=2, deterministic=True)
    assert kept == users


def test_they_are_set_before_anything_asks_for_a_gpu() -> None:
    """The command sets them before its first call of torch.cuda."""
    code = """
import os, sys, torch
from pipeline import train
def asked():
    sys.exit(0 if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else 3)
torch.cuda.is_available = asked
sys.exit(train.main(["configs/quickstart.yaml"]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _gloo_groups() -> bool:
    from megatron.core import parallel_state

    topology: Topology = build_topology(Case(world=2))
    assert topology.data_size == 2
    return parallel_state._DATA_PARALLEL_GROUP_GLOO is not None


def test_no_groups_that_nobody_uses() -> None:
    """Megatron would make a gloo group beside each of NCCL's, with sockets between all ranks."""
    assert run_ranks(2, _gloo_groups) == [False, False]


def test_the_process_group_is_not_bound_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a `device_id` a chain's transfers would share one queue; see `test_stream_waits.py`."""
    asked: dict[str, Any] = {}

    def init(backend: str, **options: Any) -> None:
        asked.update(options, backend=backend)

    monkeypatch.setattr(dist, "init_process_group", init)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "29500")
    nobody: Any = None  # one rank meets no other
    start_process_group(RankInfo(0, 0, 1), GPU.device, 10.0, nobody, nobody)
    assert asked["backend"] == "nccl"
    assert asked.get("device_id") is None


def test_a_gpu_probes_no_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes its list of ops by compiling something for each, on every rank."""
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", dict)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    build._prepare_communication(GPU)
    assert "__compatible_ops__" not in vars(deepspeed.ops)
    build._prepare_communication(CPU)
    assert vars(deepspeed.ops)["__compatible_ops__"] == {"deepspeed_shm_comm": False}


def test_transformer_engine_is_used_on_request_and_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Being installed is not enough."""
    monkeypatch.setattr(build, "transformer_engine_available", lambda: True)
    config = engine_config(Case())
    assert not build._uses_transformer_engine(config, GPU)
    train = config.train.model_copy(update={"transformer_engine": True})
    config = config.model_copy(update={"train": train})
    assert build._uses_transformer_engine(config, GPU)
    assert not build._uses_transformer_engine(config, CPU)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_asked_for_before_anything_is_built(
    tmp_path: Path, wanted: bool
) -> None:
    """`train.deterministic` in torch, when the ranks meet."""
    code = f"""
import sys, torch
from pipeline import job, train
def met(*_):
    sys.exit(0 if torch.are_deterministic_algorithms_enabled() is {wanted} else 3)
job.start_process_group = met
settings = ["run.dir={tmp_path}", "train.device=cpu", "train.deterministic={str(wanted).lower()}"]
sys.exit(train.main(["configs/quickstart.yaml", "--set", *settings]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
