"""Best-fit packing: nothing lost, nothing cut that fits, as tight as the one-by-one algorithm."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.loading.packing import Packing, pack


def packed_sequences(packing: Packing) -> list[list[tuple[int, int]]]:
    """The (start, length) pairs of each sequence."""
    return [
        [
            (int(packing.starts[piece]), int(packing.lengths[piece]))
            for piece in range(packing.first_piece[sequence], packing.first_piece[sequence + 1])
        ]
        for sequence in range(packing.num_sequences)
    ]


def one_by_one(lengths: list[int], sequence_length: int) -> list[int]:
    """Room left in each sequence by best-fit-decreasing, one piece at a time."""
    pieces = [sequence_length] * sum(length // sequence_length for length in lengths)
    pieces += sorted((length % sequence_length for length in lengths), reverse=True)
    room: list[int] = []
    for piece in filter(None, pieces):
        fitting = [index for index, left in enumerate(room) if left >= piece]
        if fitting:
            room[min(fitting, key=lambda index: room[index])] -= piece
        else:
            room.append(sequence_length - piece)
    return sorted(room)


def test_the_documented_example() -> None:
    """Sequences of 4 from documents of 3, 6, 1 and 2 tokens."""
    packing = pack(np.array([3, 6, 1, 2]), 4)
    assert packed_sequences(packing) == [[(3, 4)], [(0, 3), (9, 1)], [(7, 2), (10, 2)]]
    assert packing.padding_share == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(1, 16))
def test_every_token_is_in_one_sequence(lengths: list[int], sequence_length: int) -> None:
    """No token is lost or doubled, only long documents are cut, and no better fit was missed."""
    packing = pack(np.array(lengths, np.int64), sequence_length)
    sequences = packed_sequences(packing)
    pieces = sorted(piece for sequence in sequences for piece in sequence)
    ends = np.cumsum([0, *lengths]).tolist()
    expected = [
        (start, min(sequence_length, end - start))
        for first, end in itertools.pairwise(ends)
        for start in range(first, end, sequence_length)
    ]
    assert pieces == expected
    room = sorted(sequence_length - sum(length for _, length in sequence) for sequence in sequences)
    assert room == one_by_one(lengths, sequence_length)


def test_many_documents_pack_tightly_and_alike_every_time() -> None:
    """Lengths as of a real corpus leave less than one per cent of padding, the same each time."""
    generator = np.random.default_rng(3)
    lengths = np.ceil(generator.lognormal(5.5, 1.6, size=20_000)).astype(np.int64)
    first, second = pack(lengths, 2048), pack(lengths, 2048)
    assert first.padding_share < 0.01
    assert packed_sequences(first) == packed_sequences(second)


@pytest.mark.parametrize("sequence_length", [1, 7])
def test_an_empty_stream_has_no_sequences(sequence_length: int) -> None:
    """No documents, no sequences, no padding."""
    packing = pack(np.empty(0, np.int64), sequence_length)
    assert (packing.num_sequences, packing.padding_share) == (0, 0.0)
