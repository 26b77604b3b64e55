"""A configuration with the fewest keys that a run needs, and what is wrong with others."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.config.run_config import load_config

SMALL = """\
run: {name: small}
model: {layers: 6, hidden_size: 64, attention_heads: 4, vocab_size: 96, future_tokens: 4}
data: {shards: somewhere, sequence_length: 32}
batch: {micro_size: 2}
train: {steps: 100}
optimizer: {learning_rate: 3e-4}
schedule: {warmup_steps: 10}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with the fewest keys a run needs."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """The lines of problems that loading is refused with, without the file name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    first, *rest = str(caught.value).splitlines()
    first = first.removeprefix(f"{path}")
    return [line.removeprefix("  - ") for line in rest] or [first.removeprefix(": ")]
