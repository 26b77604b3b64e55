"""Documents to shards, piece by piece."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.building import columns as columns_module
from data_prep.building.columns import Columns
from data_prep.shards.arrow_file import ShardRows
from data_prep.tokenization.encoder import Encoder
from data_prep.tokenization.tokenizer import Tokenizer, bytes_tokenizer

TOKENIZER = Tokenizer(bytes_tokenizer(), None, "bytes")


def documents(shard: ShardRows) -> list[list[int]]:
    """The ids of each row."""
    return [
        shard.tokens[start:end].tolist()
        for start, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)
    ]


def copied(shard: ShardRows) -> ShardRows:
    """A shard that outlives the next one."""
    return shard._replace(tokens=shard.tokens.copy())


@settings(deadline=None, max_examples=100)
@given(
    batches=st.lists(st.lists(st.integers(1, 30), max_size=8), max_size=8),
    limit=st.integers(1, 60),
    batch_bytes=st.integers(1, 100),
)
def test_shards_are_full_and_in_order(
    batches: list[list[int]], limit: int, batch_bytes: int
) -> None:
    """However documents arrive, shards are the same: each as full as the limit lets it be."""
    columns_module.BATCH_BYTES, before = batch_bytes, columns_module.BATCH_BYTES
    try:
        columns = Columns(Encoder(TOKENIZER, "bytes"), limit)
        shards: list[ShardRows] = []
        for number, lengths in enumerate(batches):
            texts = [bytes([65 + number]) * length for length in lengths]
            shards += map(copied, columns.add(number, texts, range(len(texts))))
        shards += map(copied, columns.finish())
    finally:
        columns_module.BATCH_BYTES = before
    expected = [
        ([65 + number] * length + [256], number, row)
        for number, lengths in enumerate(batches)
        for row, length in enumerate(lengths)
    ]
    found = [
        (ids, int(src), int(row))
        for shard in shards
        for ids, src, row in zip(documents(shard), shard.src, shard.row, strict=True)
    ]
    assert found == expected
    assert all(len(shard.tokens) <= limit or len(shard.src) == 1 for shard in shards)
    for shard, following in itertools.pairwise(shards):
        assert len(shard.tokens) + following.offsets[1] > limit


def test_a_unit_is_given_out_while_it_is_read() -> None:
    """A unit much larger than a shard holds about one shard's tokens at any time."""
    columns = Columns(Encoder(TOKENIZER, "bytes"), limit_tokens=3 << 20)
    text = b"x" * (1 << 16)
    held = []
    for number in range(400):
        for shard in columns.add(0, [text], [number]):
            assert len(shard.tokens) > 2.9 * (1 << 20)
        held.append(columns._num_tokens)
    assert max(held) < 5 << 20
    assert sum(len(shard.src) for shard in columns.finish()) < 60
