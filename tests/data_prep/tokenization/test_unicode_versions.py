"""Characters that libraries may take differently are found, and get the ids that are defined."""

import numpy as np

from data_prep.tokenization.encoder import Encoder, choose_encoder
from data_prep.tokenization.tokenizer import Tokenizer, train_tokenizer
from data_prep.tokenization.unicode_versions import DISPUTED, disputed_characters, is_disputed


def test_exactly_the_disputed_characters_are_found() -> None:
    """Each of them, in a text; not the characters beside their ranges, and no usual text."""
    characters = disputed_characters()
    assert len(characters) == 4657
    assert all(is_disputed(f"é{character}a".encode()) for character in characters)
    beside = {number for first, last in DISPUTED for number in (first - 1, last + 1)}
    others = beside - {ord(character) for character in characters}
    assert not any(is_disputed(f"é{chr(number)}a".encode()) for number in others)
    assert not is_disputed("plain, naïve 数据 🎉 жизнь".encode())


def test_disputed_characters_get_the_ids_of_tokenizers() -> None:
    """Beside letters, numbers and signs, mixed with other documents, the ids are those defined."""
    characters = disputed_characters()
    texts = [f"a{sign}b 1{sign}2 !{sign}? {sign}{sign}" for sign in characters[::7]]
    tokenizer = Tokenizer(train_tokenizer([*texts, "a b 1 2 !?"] * 2, 900), None, "")
    assert choose_encoder(tokenizer, "auto").name == "gigatoken"
    mixed = [text for pair in zip(texts, reversed(texts), strict=True) for text in (*pair, "x 7")]
    contents = [text.encode() for text in mixed]
    fast, fast_lengths = Encoder(tokenizer, "gigatoken").encode(contents)
    slow, slow_lengths = Encoder(tokenizer, "tokenizers").encode(contents)
    assert np.array_equal(fast, slow)
    assert np.array_equal(fast_lengths, slow_lengths)
