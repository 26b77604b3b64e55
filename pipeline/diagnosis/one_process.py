"""One process's gradients of a trial, for `pipeline.diagnosis.training_step`.

A process of its own, since megatron-core and DeepSpeed keep one layout a process. It writes what a
checkpoint would hold after the first step, whose first moments are the gradients times 1 - beta.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.config.run_config import load_config
from pipeline.diagnosis.trial import trial_batches
from pipeline.distributed.rendezvous import RankInfo
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine


def write_state(config_path: Path, out: Path, data_size: int) -> NoReturn:
    """Write the state after the step into a folder, and end the process.

    Args:
        config_path: of the trial in one process.
        out: the folder.
        data_size: data-parallel ranks of the layout, all of whose samples this process takes.
    """
    config = load_config(config_path)
    os.environ["DS_ACCELERATOR"] = "cpu"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition
        topology = Topology(RankInfo(0, 0, 1), 1, torch.device("cpu"))
        engine = build_engine(config, topology, "fp32")
    batches = [
        batch
        for data_rank in range(data_size)
        for batch in trial_batches(config, 0, data_rank, data_size)
    ]
    engine.train_step(batches, config.optimizer.learning_rate)
    engine.snapshot().write(out)
    sys.stderr.flush()
    os._exit(0)  # destructors of process groups may wait
