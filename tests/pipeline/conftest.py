"""What all tests of training runs share: a tiny shard set, made once by the real command."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import CONFIG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of this project's own sources, as bytes; a third is held out."""
    output = tmp_path_factory.mktemp("shards") / "set"
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "data_prep" / "shard.py")),
            *("--input", str(ROOT / "model"), "--output", str(output)),
            *("--tokenizer", "bytes", "--validation-fraction", "0.3", "--workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    return output


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """The YAML of a tiny run on these shards; its run.dir is `tmp_path / "run"`."""
    path = tmp_path / "tiny.yaml"
    text = CONFIG.replace("shards: unset", f"shards: {shards}")
    path.write_text(text.replace("name: tiny", f"name: tiny, dir: {tmp_path / 'run'}"))
    return path
