"""What all tests of training runs share: a tiny shard set, made once by the real command."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.training_runs import CONFIG

ROOT = Path(__file__).parents[2]


def _documents(number: int) -> Iterator[str]:
    """Made-up sentences, the same ones forever: some words follow others more often."""
    generator = random.Random(20)
    words = ["".join(generator.choices("abcdefghij", k=1 + i % 7)) for i in range(50)]
    for _ in range(number):
        place, document = 0, []
        for _ in range(generator.randint(20, 200)):
            place = (place * 3 + generator.randint(0, 4)) % len(words)
            document.append(words[place])
        yield " ".join(document)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of made-up sentences, as bytes; a third is held out."""
    folder = tmp_path_factory.mktemp("shards")
    corpus, output = folder / "corpus.jsonl", folder / "set"
    lines = [json.dumps({"text": document}) + "\n" for document in _documents(120)]
    corpus.write_text("".join(lines))
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "data_prep" / "shard.py")),
            *("--input", str(corpus), "--output", str(output)),
            *("--tokenizer", "bytes", "--validation-fraction", "0.3", "--workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    return output


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """The YAML of a tiny run on these shards; its run.dir is `tmp_path / "run"`."""
    return written_config(shards, tmp_path)


def written_config(shards: Path, folder: Path, run_dir: Path | None = None) -> Path:
    """The YAML of a tiny run, in a folder; its run.dir is `folder / "run"` unless given."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny.yaml"
    text = CONFIG.replace("shards: unset", f"shards: {shards}")
    path.write_text(text.replace("name: tiny", f"name: tiny, dir: {run_dir or folder / 'run'}"))
    return path
