"""Labels of prompts and completions: by their definition, in every packing and mixture."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from data_prep.building.options import Source
from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.sequences import PackingName, SequenceFormat, cut_sequences
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet

S, HEADS = 16, 4
PACKINGS = ("concat", "best_fit", "one_per_sequence")


@pytest.fixture
def shards(tmp_path: Path, build_set: Callable[..., Manifest]) -> ShardSet:
    """A source of texts and one of questions, in small shards, with documents of 3 to 60 tokens."""
    text, qa = tmp_path / "text.jsonl", tmp_path / "qa.jsonl"
    text.write_bytes(b"".join(orjson.dumps({"text": "t" * n}) + b"\n" for n in range(2, 40)))
    lines = [{"q": "q" * (n % 11), "a": "a" * (1 + n * 7 % 43)} for n in range(60)]
    qa.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    sources = (
        Source("text", (text,), text_key="text"),
        Source("qa", (qa,), prompt_key="q", completion_key="a"),
    )
    build_set(sources=sources, validation_fraction=0, shard_tokens=90, dedup="none")
    return ShardSet.open(tmp_path / "out", "train")


def numbered(stream: ShardSet) -> tuple[list[int], list[int], list[bool]]:
    """Token, document and whether it may be a target, of a whole stream."""
    lengths = stream.document_lengths()
    targets = np.empty(stream.num_tokens, np.bool_)
    stream.read_targets(0, targets)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    return stream.read(0, stream.num_tokens).tolist(), documents.tolist(), targets.tolist()


@pytest.mark.parametrize("mask", [False, True], ids=["plain mask", "document mask"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_labels_are_completions_of_the_same_document(
    shards: ShardSet, packing: PackingName, mask: bool
) -> None:
    """Each valid label is the letter `a` or the end after it, and all that may be are there."""
    stream = shards.of_source("qa")
    form = SequenceFormat(S, HEADS, packing, mask)
    count = cut_sequences(stream, form).count
    loader = TokenLoader(stream, form, BatchLayout(count), seed=0, shuffle=False)
    batch = loader.read(0, count)
    assert (batch.documents is not None) == mask
    documented = TokenLoader(
        stream, SequenceFormat(S, HEADS, packing, True), BatchLayout(count), seed=0, shuffle=False
    ).read(0, count)
    numbers = documented.documents
    assert numbers is not None
    assert torch.equal(documented.labels, batch.labels)
    letters = {ord("a"), stream.eos_id}
    found = set(batch.labels[batch.labels >= 0].tolist())
    assert found == letters
    # Within S: a target is there exactly if the token k ahead is a completion's of this document.
    for k in range(1, HEADS + 1):
        ahead, before = batch.tokens[:, k:], batch.tokens[:, k - 1 : -1]
        same = numbers[:, k:] == numbers[:, :-k]
        # No document is empty, so of two ends in a row the second is padding.
        padding = (ahead == stream.eos_id) & (before == stream.eos_id)
        wanted = same & torch.isin(ahead, torch.tensor([*letters])) & ~padding
        assert torch.equal(batch.labels[k - 1, :, : S - k] >= 0, wanted)
        assert bool(wanted.any())


def test_concatenated_labels_are_those_of_the_stream(shards: ShardSet) -> None:
    """Also in the n positions behind a sequence, over the borders of shards."""
    stream = shards.of_source("qa")
    tokens, documents, targets = numbered(stream)
    form = SequenceFormat(S, HEADS)
    count = cut_sequences(stream, form).count
    labels = (
        TokenLoader(stream, form, BatchLayout(count), seed=0, shuffle=False).read(0, count).labels
    )
    for sequence in range(count):
        for k in range(1, HEADS + 1):
            for t in range(S):
                here, ahead = sequence * S + t, sequence * S + t + k
                is_target = targets[ahead] and documents[ahead] == documents[here]
                assert labels[k - 1, sequence, t] == (tokens[ahead] if is_target else -100)


@pytest.mark.parametrize("packing", PACKINGS)
def test_texts_in_a_mixture_keep_all_their_targets(shards: ShardSet, packing: PackingName) -> None:
    """A sample of the mixture has the labels that it has where its source is alone."""
    form = SequenceFormat(S, HEADS, packing)
    mixed = TokenLoader(shards, form, BatchLayout(8), seed=3)
    alone = {
        name: TokenLoader(shards.of_source(name), form, BatchLayout(1), seed=3)
        for name in shards.sources
    }
    seen = dict.fromkeys(shards.sources, 0)
    batch = mixed.read(0, 30)
    sources, _ = mixed.mixture.locate(np.arange(30))
    for index, number in enumerate(sources.tolist()):
        name = shards.sources[number]
        expected = alone[name].read(seen[name], 1)
        assert torch.equal(batch.tokens[index], expected.tokens[0])
        assert torch.equal(batch.labels[:, index], expected.labels[:, 0])
        seen[name] += 1
    assert min(seen.values()) > 3
    assert alone["text"].read(0, 1).documents is None


def test_one_document_per_sequence(shards: ShardSet) -> None:
    """Each sequence begins a document or goes on with one that is longer than a sequence."""
    stream = shards.of_source("qa")
    cut = cut_sequences(stream, SequenceFormat(S, HEADS, "one_per_sequence"))
    lengths = stream.document_lengths()
    assert cut.count == int(-(-lengths // S).sum())
    tokens = np.empty((cut.count, S + HEADS), stream.dtype)
    ends = cut.fill(range(cut.count), list(tokens), None)
    for row, end in zip(tokens, ends, strict=True):
        assert stream.eos_id not in row[: end - 1].tolist()
