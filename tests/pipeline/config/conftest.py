"""A configuration with the fewest keys that a run needs."""

from pathlib import Path

import pytest

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
