"""What is set before CUDA starts, and what is not set again."""

import subprocess
import sys

from pipeline.distributed.cuda_settings import prepare_cuda
from pipeline.distributed.topology import Topology
from tests.support.engine_cases import Case, build_topology
from tests.support.harness import run_ranks


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
