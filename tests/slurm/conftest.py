"""Job scripts with stand-ins for Slurm's commands."""

from pathlib import Path

import pytest

from tests.slurm.stand_ins import Job


@pytest.fixture
def pretrain(tmp_path: Path) -> Job:
    """The pretraining job."""
    return Job(tmp_path, "pretrain_7b.sh")


@pytest.fixture
def shard(tmp_path: Path) -> Job:
    """The shard job, with what it requires."""
    job = Job(tmp_path, "shard_corpus.sh")
    job.environment |= {
        "INPUT": "raw/a raw/b",
        "OUTPUT": "data/c",
        "TOKENIZER": "train:32000",
        "SLURM_JOB_NUM_NODES": "1",
    }
    return job
