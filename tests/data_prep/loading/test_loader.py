"""Batches: label alignment, order, splits of the global batch, prefetching."""

import itertools
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import DataError
from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.loading.mixture import Mixture, MixtureSegment, block_counts
from data_prep.loading.review_order import Pass, ReviewOrder
from data_prep.loading.selection import KeptSequences
from data_prep.loading.sequences import PackingName, SequenceFormat
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet

S, N = 16, 4


@pytest.fixture
def shards(
    tmp_path: Path,
    texts: list[str],
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> ShardSet:
    """A train split of many small shards."""
    build_set(write_jsonl(texts[:60]), unit_bytes=2000)
    return ShardSet.open(tmp_path / "out", "train")


def make_loader(
    shards: ShardSet,
    *,
    micro: int = 2,
    accumulation: int = 1,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 5,
    shuffle: bool = True,
    heads: int = N,
    packing: PackingName = "concat",
    documents: bool = False,
    weights: Mapping[str, float] | None = None,
) -> TokenLoader:
    """A loader of short sequences."""
    return TokenLoader(
        shards,
        SequenceFormat(S, heads, packing, documents),
        BatchLayout(micro, accumulation, data_rank=rank, data_size=ranks),
        seed=seed,
        shuffle=shuffle,
        weights=weights,
    )


def test_labels_are_the_tokens_ahead(shards: ShardSet) -> None:
    """labels[k-1, b, t] is token t + k of its sequence, border included, never -100."""
    loader = make_loader(shards, shuffle=False)
    stream = torch.from_numpy(shards.read(0, shards.num_tokens).astype("int64"))
    (batch,) = loader.step_batches(6)
    assert batch.tokens.shape == (2, S)
    assert batch.labels.shape == (N, 2, S)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    for index, head, position in itertools.product(range(2), range(1, N + 1), range(S)):
        start = (6 + index) * S
        assert batch.tokens[index, position] == stream[start + position]
        assert batch.labels[head - 1, index, position] == stream[start + position + head]


def test_sequences_overlap_so_that_no_target_is_missing(shards: ShardSet) -> None:
    """An epoch has n targets for each input position, and its inputs tile the stream."""
    loader = make_loader(shards, micro=1)
    stream = shards.read(0, shards.num_tokens).tolist()
    assert loader.num_samples == (len(stream) - N) // S
    batches = [loader.step_batches(sample)[0] for sample in range(loader.num_samples)]
    num_targets = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert num_targets == N * loader.num_samples * S
    ordered = make_loader(shards, micro=1, shuffle=False)
    tokens = [
        token
        for sample in range(loader.num_samples)
        for token in ordered.step_batches(sample)[0].tokens[0].tolist()
    ]
    assert tokens == stream[: loader.num_samples * S]
    assert sorted(batch.tokens[0].tolist() for batch in batches) == sorted(
        tokens[start : start + S] for start in range(0, len(tokens), S)
    )


@pytest.mark.parametrize(
    ("ranks", "micro", "accumulation"),
    [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)],
)
def test_the_global_batch_does_not_depend_on_its_split(
    shards: ShardSet, ranks: int, micro: int, accumulation: int
) -> None:
    """Every split of 8 samples has the same ones in the same order, across an epoch border too."""
    whole = make_loader(shards, micro=8)
    for next_sample in (0, 8, whole.num_samples - 3, 5 * whole.num_samples):
        loaders = [
            make_loader(shards, micro=micro, accumulation=accumulation, rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        assert {loader.global_batch_size for loader in loaders} == {8}
        per_rank = [loader.step_batches(next_sample) for loader in loaders]
        parts = [per_rank[rank][step] for step in range(accumulation) for rank in range(ranks)]
        (expected,) = whole.step_batches(next_sample)
        assert torch.equal(torch.cat([batch.tokens for batch in parts]), expected.tokens)
        assert torch.equal(torch.cat([batch.labels for batch in parts], dim=1), expected.labels)


@pytest.fixture
def mixed(texts: list[str], build_mixture: Callable[..., Path]) -> ShardSet:
    """The train split of a set of two sources."""
    directory = build_mixture(web=texts[:60], code=[text.upper() for text in texts[60:90]])
    return ShardSet.open(directory, "train")


def test_each_source_has_its_own_order_and_epochs(mixed: ShardSet) -> None:
    """With weights 1 : 3 a source's sequences come in its own permutation, epoch after epoch."""
    loader = make_loader(mixed, micro=4, weights={"web": 1, "code": 3})
    given: dict[str, list[list[int]]] = {"web": [], "code": []}
    for first in range(0, 1000, 4):
        sources, indices = loader.mixture.locate(np.arange(first, first + 4))
        (batch,) = loader.step_batches(first)
        for source, index, tokens in zip(sources, indices, batch.tokens.tolist(), strict=True):
            found = given[mixed.sources[source]]
            assert len(found) == index
            found.append(tokens)
    assert {name: len(found) for name, found in given.items()} == {"web": 250, "code": 750}
    assert loader.mixture.counts(1000) == {"web": 250, "code": 750}
    for name, found in given.items():
        alone = make_loader(mixed.of_source(name), micro=1)
        count = loader.sequences_by_source[name]
        assert alone.num_samples == count
        for sample, tokens in enumerate(found):
            assert alone.step_batches(sample)[0].tokens[0].tolist() == tokens
    code, count = given["code"], loader.sequences_by_source["code"]
    assert sorted(code[:count]) == sorted(code[count : 2 * count])
    assert code[:count] != code[count : 2 * count]


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_mixed_global_batches_do_not_depend_on_their_split(
    mixed: ShardSet, ranks: int, micro: int, accumulation: int
) -> None:
    """Sources, packing and document numbers included, over a change of weights."""
    segments = [
        MixtureSegment(first_sample=0, counts=block_counts({"web": 2, "code": 1})),
        MixtureSegment(first_sample=21, counts=block_counts({"web": 1, "code": 4})),
    ]

    def load(rank: int, ranks: int, micro: int, accumulation: int) -> TokenLoader:
        loader = make_loader(
            mixed,
            micro=micro,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
            packing="best_fit",
            documents=True,
        )
        loader.mixture = Mixture(mixed.sources, segments)
        return loader

    whole = load(0, 1, 8, 1)
    loaders = [load(rank, ranks, micro, accumulation) for rank in range(ranks)]
    for next_sample in (0, 16, 1000):
        per_rank = [loader.step_batches(next_sample) for loader in loaders]
        parts = [per_rank[rank][step] for step in range(accumulation) for rank in range(ranks)]
        (expected,) = whole.step_batches(next_sample)
        assert expected.documents is not None
        numbers = [batch.documents for batch in parts if batch.documents is not None]
        assert torch.equal(torch.cat([batch.tokens for batch in parts]), expected.tokens)
        assert torch.equal(torch.cat([batch.labels for batch in parts], dim=1), expected.labels)
        assert torch.equal(torch.cat(numbers), expected.documents)


def test_the_order_is_a_pure_function(shards: ShardSet) -> None:
    """Fresh loaders asked in any order agree; seed and epoch change the order."""
    loader = make_loader(shards)
    forward = [loader.step_batches(sample)[0].tokens for sample in range(0, 20, 2)]
    fresh = make_loader(shards)
    backward = [fresh.step_batches(sample)[0].tokens for sample in reversed(range(0, 20, 2))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    other_seed = make_loader(shards, seed=6).step_batches(0)[0].tokens
    next_epoch = loader.step_batches(loader.num_samples)[0].tokens
    assert not torch.equal(other_seed, forward[0])
    assert not torch.equal(next_epoch, forward[0])


def test_heads_share_their_labels(shards: ShardSet) -> None:
    """More heads add targets and change none: head k sees the same labels for any n above k."""
    one, four = (make_loader(shards, heads=n, shuffle=False).step_batches(0)[0] for n in (1, 4))
    assert torch.equal(one.tokens, four.tokens)
    assert torch.equal(one.labels[0], four.labels[0])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("documents", [False, True])
def test_what_follows_an_end_is_trained_unless_documents_are_kept_apart(
    shards: ShardSet, packing: PackingName, documents: bool
) -> None:
    """With either packing, no head has a target past an end, at it or before it, if they are."""
    loader = make_loader(shards, micro=1, packing=packing, documents=documents)
    past_an_end = 0
    for sample in range(loader.num_samples):
        (batch,) = loader.step_batches(sample)
        tokens, labels = batch.tokens[0].tolist(), batch.labels[:, 0].tolist()
        for position, token in enumerate(tokens):
            if token == shards.eos_id:  # head k at k - 1 before it has the target after it
                ahead = [labels[k][position - k] for k in range(min(N, position + 1))]
                past_an_end += sum(target != -100 for target in ahead)
    assert (past_an_end == 0) == documents


def equal(first: list[Batch], second: list[Batch]) -> bool:
    """True when two steps hold the same micro-batches."""
    return len(first) == len(second) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        for a, b in zip(first, second, strict=True)
    )


def prefetch_threads() -> int:
    """Number of prefetch threads alive."""
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetching_changes_nothing(shards: ShardSet) -> None:
    """From any position the iterator gives the direct batches, and closing it ends its thread."""
    loader = make_loader(shards, micro=2, accumulation=2, rank=1, ranks=2)
    for first in (0, 24):
        ahead = loader.prefetch(itertools.count(first, 8), steps_ahead=3)
        for step, batches in enumerate(itertools.islice(ahead, 30)):
            assert equal(batches, loader.step_batches(first + step * loader.global_batch_size))
        assert prefetch_threads() == 1
        ahead.close()
        assert prefetch_threads() == 0


def test_an_error_in_the_thread_reaches_the_consumer(shards: ShardSet) -> None:
    """A shard that is cut during the run ends the iteration with its own error."""
    ahead = make_loader(shards).prefetch(itertools.count(0, 2))
    next(ahead)
    for shard in shards.manifest.shards:
        os.truncate(shards.directory / shard.path, 10)
    with pytest.raises(DataError, match=r"was cut while in use|bytes, the manifest says"):
        list(itertools.islice(ahead, 1000))
    assert prefetch_threads() == 0


def test_too_small_a_split_is_refused(
    tmp_path: Path,
    shards: ShardSet,
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
) -> None:
    """Less than one sequence, or less than one global batch, says both numbers."""
    build_set(write_jsonl(["a" * 18], "b.jsonl"), output="tiny", validation_fraction=0)
    tiny = ShardSet.open(tmp_path / "tiny", "train")
    with pytest.raises(DataError, match=r"has 19 tokens, fewer than one sequence of .* = 20"):
        make_loader(tiny)
    with pytest.raises(DataError, match="has 0 tokens"):
        make_loader(ShardSet.open(tmp_path / "tiny", "validation"))
    count = make_loader(shards).num_samples
    assert make_loader(shards, micro=count).num_samples == count
    with pytest.raises(DataError, match=f"fewer than one global batch of {count + 1}"):
        make_loader(shards, micro=count + 1)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_each_pass_has_each_sequence_once_over_all_ranks(
    shards: ShardSet, ranks: int, accumulation: int
) -> None:
    """L3: whatever shares ranks have, of whole steps and of those that end before a choice."""
    loaders = [
        make_loader(shards, micro=1, accumulation=accumulation, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    total = loaders[0].num_samples
    kept = KeptSequences.by_loss(np.random.default_rng(1).random(total, np.float32), total // 2)
    sizes = [total, kept.count, kept.count, total]
    firsts = np.cumsum([0, *sizes]).tolist()
    passes = [Pass(n, n, 0, 0, firsts[n], sizes[n], sizes[n] < total) for n in range(4)]
    order = ReviewOrder(passes, total, [total], "f", seed=1)
    order.keep(1, kept)
    order.keep(2, kept)
    for loader in loaders:
        loader.follow(order)
    ordered = make_loader(shards, shuffle=False).read(0, total).tokens
    found: list[list[bytes]] = [[] for _ in passes]
    sample = 0
    while sample < order.end:
        end = loaders[0].step_end(sample)
        for rank, loader in enumerate(loaders):
            for micro, batch in enumerate(loader.step_batches(sample)):
                place = loader.layout.first_sample(sample, micro)
                assert bool((batch.labels[0] == -100).all()) == (place >= end), rank
                if place < end:
                    found[order.pass_at(place).number].append(batch.tokens.numpy().tobytes())
        sample = end
    for one, rows in zip(passes, found, strict=True):
        numbers = kept(np.arange(kept.count)) if one.chosen else np.arange(total)
        assert sorted(rows) == sorted(ordered[number].numpy().tobytes() for number in numbers)
