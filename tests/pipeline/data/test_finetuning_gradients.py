"""Finetuning: what is no target changes no gradient, through the real loader and model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import pytest
import torch
from torch import Tensor

from data_prep.building.build import build
from data_prep.building.options import BuildOptions
from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet
from model.backward import sequential_backward
from model.loss import IGNORED
from tests.data_prep.conftest import Silence
from tests.support.tiny_model import training_model

HEADS = 3
QA = Sequence[tuple[str, str]]
Read = Callable[..., Batch]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The first sequence of a set of questions and answers, by the real commands and loader."""

    def run(name: str, pairs: QA, length: int, *, mask: bool = False) -> Batch:
        path = tmp_path / f"{name}.jsonl"
        lines = [{"q": question, "a": answer} for question, answer in pairs]
        path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        options = BuildOptions(
            output=tmp_path / name, tokenizer="bytes", inputs=(path,), workers=1,
            validation_fraction=0, prompt_key="q", completion_key="a",
        )  # fmt: skip
        build(options, Silence())
        shards = ShardSet.open(tmp_path / name, "train")
        form = SequenceFormat(length, HEADS, documents=mask)
        return TokenLoader(shards, form, BatchLayout(1), seed=0, shuffle=False).read(0, 1)

    return run


def gradients(batch: Batch, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Every gradient of one micro-batch in float64; ids beyond the tiny vocabulary wrap around."""
    model = training_model()
    vocabulary = model.config.vocab_size
    labels = batch.labels if labels is None else labels
    labels = torch.where(labels == IGNORED, labels, labels % vocabulary)
    scales = 1.0 / (labels != IGNORED).sum((1, 2)).clamp(min=1).double()
    output = model(batch.tokens % vocabulary, documents=batch.documents)
    sequential_backward(
        model, output, labels, scales, chunk_tokens=7, documents=batch.documents
    ).surrogate_loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any gradient."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_tokens_of_a_prompt_that_are_only_targets(read: Read) -> None:
    """Behind the inputs of a sequence lie n more tokens; those of a prompt may be anything.

    The second document's prompt begins two tokens before the inputs end: changed behind that, only
    targets change. The same change in a completion does change gradients.
    """
    first = ("what?", "that")  # with its end 10 tokens
    length = 12
    one = read("one", [first, ("ab" + "cde" + "f" * 20, "x" * 30)], length)
    other = read("other", [first, ("ab" + "CDE" + "f" * 20, "x" * 30)], length)
    assert torch.equal(one.tokens, other.tokens)
    assert differ(gradients(one), gradients(other)) == 0
    one = read("three", [first, ("a", "b" + "cde" + "x" * 30)], length)
    other = read("four", [first, ("a", "b" + "CDE" + "x" * 30)], length)
    assert torch.equal(one.tokens, other.tokens)
    assert differ(gradients(one), gradients(other)) > 1e-6


def test_another_next_document_changes_nothing_of_this_one(read: Read) -> None:
    """With document_mask: neither its prompt nor its completion, as inputs or as targets."""
    first = ("what?", "that")
    one = read("one", [first, ("q", "answer" * 4)], 20, mask=True)
    other = read("other", [first, ("?", "RETORT" * 4)], 20, mask=True)
    assert not torch.equal(one.tokens, other.tokens)
    assert one.documents is not None
    assert other.documents is not None

    def of_first(batch: Batch, documents: Tensor) -> Tensor:
        return batch.labels.masked_fill((documents != 0)[None], IGNORED)

    found = gradients(one, of_first(one, one.documents))
    assert max(float(part.abs().max()) for part in found.values()) > 1e-3
    assert differ(found, gradients(other, of_first(other, other.documents))) < 1e-14
    # Without the rule the last heads would look into the next document.
    crossing = of_first(one, one.documents)
    crossing[HEADS - 1, 0, 9] = int(one.tokens[0, 12])
    assert differ(found, gradients(one, crossing)) > 1e-6


def test_a_batch_of_prompts_alone(read: Read) -> None:
    """No target at all: every gradient is there and zero."""
    batch = read("one", [("why " * 20, "so")], 16)
    assert bool((batch.labels == IGNORED).all())
    assert max(float(part.abs().max()) for part in gradients(batch).values()) == 0
