"""Characters that libraries may take differently are found, and get the ids that are defined."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.tokenization import encoder as encoder_module
from data_prep.tokenization.encoder import Encoder, choose_encoder
from data_prep.tokenization.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from data_prep.tokenization.unicode_versions import (
    DISPUTED,
    DISPUTED_MARKS,
    asks_for_marks,
    disputed_characters,
    is_disputed,
)

# Of newer models: combining marks belong to the word. The library knows this very pattern.
MARKS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Two that are older than all tables, of different classes, and one that composes with many letters.
AMONG = ("a{}", "\u0301{}\u0323", "\u0323{}\u0301", "1{}2", "!{}?", "A{}b")


def marks_tokenizer(layout: dict[str, Any], texts: list[str]) -> Tokenizer:
    """A tokenizer of bytes joined across any border, so that another split gives other ids."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    parts = json.loads(trained.to_str()) | layout
    return Tokenizer(json.dumps(parts).encode(), None, "")


def normalizing(texts: list[str]) -> Tokenizer:
    """One of Qwen's kind: the canonical composition of Unicode comes before anything else."""
    steps = json.loads(train_tokenizer(["a"], 257))["pre_tokenizer"]
    return marks_tokenizer({"normalizer": {"type": "NFC"}, "pre_tokenizer": steps}, texts)


def splitting(texts: list[str]) -> Tokenizer:
    """One whose pattern has marks in it."""
    steps = json.loads(train_tokenizer(["a"], 257))["pre_tokenizer"]
    steps["pretokenizers"][0]["pattern"] = {"Regex": MARKS_PATTERN}
    return marks_tokenizer({"pre_tokenizer": steps}, texts)


@pytest.mark.parametrize("with_marks", [False, True])
def test_exactly_the_disputed_characters_are_found(with_marks: bool) -> None:
    """Each of them, in a text; not the characters beside their ranges, and no usual text."""
    characters = disputed_characters(with_marks)
    assert len(characters) == 4657 + 177 * with_marks
    assert all(is_disputed(f"é{character}a".encode(), with_marks) for character in characters)
    ranges = (*DISPUTED, *DISPUTED_MARKS)
    beside = {number for first, last in ranges for number in (first - 1, last + 1)}
    others = beside - {ord(character) for character in characters}
    assert not any(is_disputed(f"é{chr(number)}a".encode(), with_marks) for number in others)
    assert not is_disputed("plain, naïve 数据 🎉 жизнь được ყველა".encode(), with_marks)


def test_disputed_characters_get_the_ids_of_tokenizers() -> None:
    """Beside letters, numbers and signs, mixed with other documents, the ids are those defined."""
    characters = disputed_characters(with_marks=False)
    texts = [f"a{sign}b 1{sign}2 !{sign}? {sign}{sign}" for sign in characters[::7]]
    tokenizer = Tokenizer(train_tokenizer([*texts, "a b 1 2 !?"] * 2, 900), None, "")
    assert choose_encoder(tokenizer, "auto").name == "gigatoken"
    mixed = [text for pair in zip(texts, reversed(texts), strict=True) for text in (*pair, "x 7")]
    contents = [text.encode() for text in mixed]
    fast, fast_lengths = Encoder(tokenizer, "gigatoken").encode(contents)
    slow, slow_lengths = Encoder(tokenizer, "tokenizers").encode(contents)
    assert np.array_equal(fast, slow)
    assert np.array_equal(fast_lengths, slow_lengths)


def differing(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts to which the two encoders give other ids."""
    contents = [text.encode() for text in texts]
    fast, fast_lengths = Encoder(tokenizer, "gigatoken").encode(contents)
    slow, slow_lengths = Encoder(tokenizer, "tokenizers").encode(contents)
    pieces = (
        np.split(ids, np.cumsum(n)[:-1]) for ids, n in ((fast, fast_lengths), (slow, slow_lengths))
    )
    return [text for text, a, b in zip(texts, *pieces, strict=True) if not np.array_equal(a, b)]


@pytest.mark.parametrize("kind", [normalizing, splitting])
def test_marks_get_the_ids_of_tokenizers(kind: Callable[[list[str]], Tokenizer]) -> None:
    """Each disputed mark and letter alone, among other marks, and before what it composes with."""
    characters = [
        chr(number) for first, last in DISPUTED_MARKS for number in range(first, last + 1)
    ]
    later = ["\U0001611e\U00016129", "\U000105d2\u0307", "\U000113c2\U000113c9"]
    texts = [among.format(sign) for among in AMONG for sign in characters] + later
    tokenizer = kind(texts)
    assert choose_encoder(tokenizer, "auto").name == "gigatoken"
    assert differing(tokenizer, texts) == []


def test_a_library_with_other_tables_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe itself sees a mark that is ordered differently, should a table here miss one."""
    tokenizer = normalizing(["text"])
    monkeypatch.setattr(encoder_module, "is_disputed", lambda *_: False)
    report = choose_encoder(tokenizer, "auto")
    assert report.name == "tokenizers"
    assert "gigatoken gives other ids for " in report.note


def test_only_tokenizers_that_look_at_marks_pay_for_them() -> None:
    """Most split patterns know no marks."""
    layout = json.loads(train_tokenizer(["a"], 257))
    assert not asks_for_marks(layout)
    assert asks_for_marks(layout | {"normalizer": {"type": "NFC"}})
    assert asks_for_marks(json.loads(splitting(["a"]).content))


@pytest.mark.stress
@pytest.mark.parametrize("kind", [normalizing, splitting])
@pytest.mark.parametrize("among", AMONG)
def test_every_character_gets_the_ids_of_tokenizers(
    kind: Callable[[list[str]], Tokenizer], among: str
) -> None:
    """All that Unicode has or may assign up to U+3FFFF: the tables here miss none."""
    numbers = [number for number in range(0x40000) if not 0xD800 <= number < 0xE000]
    texts = [among.format(chr(number)) for number in numbers]
    assert differing(kind(texts[::61]), texts) == []


@pytest.mark.stress
@pytest.mark.parametrize("block", [0x1100, 0x10500, 0x11000, 0x11300, 0x11900, 0x16100, 0x16D00])
def test_every_pair_composes_as_in_tokenizers(block: int) -> None:
    """Pairs of one block, where the letters are that later versions of Unicode compose."""
    texts = [chr(block + a) + chr(block + b) for a in range(256) for b in range(256)]
    texts += [f"{chr(block + a)}{sign}" for a in range(256) for sign in "\u0307\u0338\u3099"]
    assert differing(normalizing(texts[::97]), texts) == []
