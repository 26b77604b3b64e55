"""Sequences with document numbers: concat and best fit, at every border, for every head count."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.loading.sequences import PackingName, SequenceFormat, cut_sequences
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet

S = 16


@pytest.fixture
def shards(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> ShardSet:
    """A train split of many small shards; some documents are shorter than a sequence."""
    short = ["", "x", "yz", "seven c", "fifteen letters", "x" * (S - 1), "x" * (3 * S)]
    build_set(write_jsonl([*short, *texts[:50]]), unit_bytes=900, validation_fraction=0)
    return ShardSet.open(tmp_path / "out", "train")


def all_sequences(
    shards: ShardSet, packing: PackingName, heads: int, *, documents: bool = True
) -> Batch:
    """Every sequence of an epoch in stream order, as one batch."""
    sequence_format = SequenceFormat(S, heads, packing, documents)
    layout = BatchLayout(micro_size=cut_sequences(shards, sequence_format).count)
    loader = TokenLoader(shards, sequence_format, layout, seed=0, shuffle=False)
    return loader.step_batches(0)[0]


def by_definition(
    tokens: list[int], documents: list[int], ends: int, heads: int
) -> list[list[int]]:
    """Labels by their definition: token t + k if it is there and of the same document."""
    return [
        [
            tokens[t + k] if t + k < ends and documents[t + k] == documents[t] else -100
            for t in range(S)
        ]
        for k in range(1, heads + 1)
    ]


@pytest.mark.parametrize("heads", [1, 2, 4, S - 1])
def test_concatenated_sequences_know_their_documents(shards: ShardSet, heads: int) -> None:
    """Numbers rise after each end of document, also at sequence and shard borders; so do labels."""
    batch = all_sequences(shards, "concat", heads)
    assert batch.documents is not None
    assert batch.documents.dtype == torch.int32
    assert batch.documents.shape == batch.tokens.shape
    stream = shards.read(0, shards.num_tokens).astype(np.int64)
    document_of = np.cumsum(np.concatenate([[0], stream[:-1] == shards.eos_id]))
    for number in range(len(batch.tokens)):
        window = slice(number * S, number * S + S + heads)
        tokens = stream[window].tolist()
        documents = (document_of[window] - document_of[number * S]).tolist()
        assert batch.tokens[number].tolist() == tokens[:S]
        assert batch.documents[number].tolist() == documents[:S]
        expected = by_definition(tokens, documents, S + heads, heads)
        assert batch.labels[:, number].tolist() == expected
    # An end of document is a target, and has none.
    ends = batch.tokens == shards.eos_id
    assert int((batch.labels[0] == shards.eos_id).sum()) > 40
    assert bool((batch.labels[:, ends] == -100).all())


@pytest.mark.parametrize("heads", [1, 3])
def test_packed_sequences_hold_whole_documents(shards: ShardSet, heads: int) -> None:
    """A document that fits a sequence is whole in one; long ones go on; padding has no labels."""
    batch = all_sequences(shards, "best_fit", heads)
    assert batch.documents is not None
    stream = shards.read(0, shards.num_tokens).astype(np.int64)
    lengths = shards.document_lengths()
    texts = [
        tuple(stream[end - length : end].tolist())
        for end, length in zip(np.cumsum(lengths), lengths, strict=True)
    ]
    whole = sorted(text for text in texts if len(text) <= S)
    pieces = [text[at : at + S] for text in texts if len(text) > S for at in range(0, len(text), S)]
    sequences = cut_sequences(shards, SequenceFormat(S, heads, "best_fit"))
    assert sequences.count == len(batch.tokens)
    found = []
    for number in range(sequences.count):
        tokens, documents = np.empty(S + heads, np.uint16), np.empty(S + heads, np.int32)
        end = min(*sequences.fill([number], [tokens], [documents]), S)
        assert tokens[:S].tolist() == batch.tokens[number].tolist()
        assert documents[:S].tolist() == batch.documents[number].tolist()
        assert documents[0] == 0
        assert set(np.diff(documents[:S])) <= {0, 1}
        assert set(tokens[end:S].tolist()) <= {shards.eos_id}
        assert bool((batch.labels[:, number, end:] == -100).all())
        assert end == S or documents[end] == documents[end - 1] + 1
        for document in range(documents[end - 1] + 1):
            found.append(tuple(tokens[:end][documents[:end] == document].tolist()))
    trained = int((batch.labels[0] != -100).sum())
    assert sorted(found) == sorted([*whole, *pieces])
    # Head 1 has a target at each token but the last of each document.
    assert trained == shards.num_tokens - len(texts)


def test_packed_sequences_without_numbers_have_targets_across_documents(shards: ShardSet) -> None:
    """Without document numbers only padding has no target, and the sequences are the same."""
    masked = all_sequences(shards, "best_fit", 3)
    plain = all_sequences(shards, "best_fit", 3, documents=False)
    assert plain.documents is None
    assert torch.equal(masked.tokens, plain.tokens)
    number = int((plain.labels[0] != -100).sum(dim=1).eq(S - 1).nonzero()[0])
    for head in range(1, 4):
        assert (
            plain.labels[head - 1, number, : S - head].tolist()
            == plain.tokens[number, head:].tolist()
        )
        assert plain.labels[head - 1, number, S - head :].tolist() == [-100] * head
    agree = masked.labels != -100
    assert torch.equal(masked.labels[agree], plain.labels[agree])


def test_a_long_document_keeps_its_targets_at_sequence_borders(
    tmp_path: Path, write_jsonl: Callable[..., Path], build_set: Callable[..., Manifest]
) -> None:
    """Sequences cut from one document have the next tokens as targets; only its end has fewer."""
    build_set(write_jsonl(["abcdefgh" * 6]), validation_fraction=0)
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.num_tokens == 3 * S + 1
    batch = all_sequences(shards, "best_fit", 4)
    stream = [*shards.read(0, 3 * S + 1).astype(np.int64).tolist(), *[-100] * 8]
    for number in range(3):
        for head in range(1, 5):
            start = number * S + head
            assert batch.labels[head - 1, number].tolist() == stream[start : start + S]
    assert batch.tokens[3].tolist() == [shards.eos_id] * S
    assert bool((batch.labels[:, 3] == -100).all())


def test_document_numbers_do_not_change_the_order(shards: ShardSet) -> None:
    """Asking for document numbers changes neither sequences nor the labels that stay."""
    with_numbers, without = (
        all_sequences(shards, "concat", 2, documents=on) for on in (True, False)
    )
    assert torch.equal(with_numbers.tokens, without.tokens)
    same = with_numbers.labels != -100
    assert torch.equal(with_numbers.labels[same], without.labels[same])
    assert bool((without.labels != -100).all())
