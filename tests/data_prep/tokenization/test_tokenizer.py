"""Tokenizers: exact round trips, EOS, vocabulary sizes, dtypes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    bytes_tokenizer,
    cut_text,
    read_tokenizer,
    token_dtype,
    train_tokenizer,
)

UNICODE = st.text(st.characters(codec="utf-8"), max_size=200)
BYTES = Tokenizer(bytes_tokenizer(), None, "bytes")
PROSE = [f"The loss of step {n}\n  is {n * 7}: naïve <|endoftext|> text\r\n" for n in range(400)]
TRAINED = Tokenizer(train_tokenizer(PROSE, 400), None, "trained")


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(UNICODE, min_size=1, max_size=4))
@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_every_text_decodes_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Any Unicode text comes back exactly, with one EOS after each document and none inside."""
    flat, lengths = tokenizer.encode_documents(texts)
    ends = np.cumsum(lengths)
    assert np.flatnonzero(flat == tokenizer.eos_id).tolist() == (ends - 1).tolist()
    for text, end, length in zip(texts, ends, lengths, strict=True):
        assert tokenizer.decode(flat[end - length : end - 1]) == text


@settings(deadline=None, max_examples=100)
@given(text=UNICODE)
def test_bytes_ids_are_utf8_and_the_file_agrees(text: str) -> None:
    """The fast path gives UTF-8 bytes, and the tokenizer.json itself gives the same ids."""
    flat, _ = BYTES.encode_documents([text])
    assert flat.tolist() == [*text.encode(), 256]
    library = tokenizers.Tokenizer.from_str(BYTES.content.decode())
    library.encode_special_tokens = True
    assert library.encode(text).ids == flat[:-1].tolist()


def test_special_token_text_is_ordinary_text() -> None:
    """A document that spells the EOS token does not become EOS."""
    for tokenizer in (BYTES, TRAINED):
        flat, _ = tokenizer.encode_documents([END_OF_TEXT])
        assert flat.tolist().count(tokenizer.eos_id) == 1
        assert len(flat) > 2


def test_training_gives_the_size_asked_for() -> None:
    """The vocabulary is exactly V with EOS, fewer for a tiny corpus, and the same each time."""
    assert TRAINED.vocab_size == 400
    assert train_tokenizer(PROSE, 400) == TRAINED.content
    assert Tokenizer(train_tokenizer(["ab"], 400), None, "").vocab_size < 400
    with pytest.raises(DataError, match="train:256 is below 257"):
        train_tokenizer(PROSE, 256)


@settings(deadline=None, max_examples=150)
@given(
    pieces=st.lists(
        st.sampled_from(["\n", "\r\n", " ", "a", "B", "7", ".", "'s", "\t", "é", "数"])
    ),
    size=st.integers(1, 20),
)
def test_parts_of_a_text_encode_as_the_whole(pieces: list[str], size: int) -> None:
    """Cutting a giant text at line ends before letters changes no id."""
    text = "".join(pieces)
    parts = list(cut_text(text, size))
    assert "".join(parts) == text
    whole = TRAINED.encode_documents([text])[0][:-1].tolist()
    ids = [token for part in parts for token in TRAINED.encode_documents([part])[0][:-1].tolist()]
    assert ids == whole


def test_giant_documents_take_the_cut_path_unchanged() -> None:
    """A document above the part size gets the ids that the library gives for the whole."""
    text = "".join(PROSE) * 60
    assert len(text) > 1 << 20
    flat, _ = TRAINED.encode_documents([text, "x"])
    library = tokenizers.Tokenizer.from_str(TRAINED.content.decode())
    library.encode_special_tokens = True
    assert flat.tolist()[:-2] == [*library.encode(text).ids, TRAINED.eos_id]


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_are_never_wrapped(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., object],
    largest: int,
    dtype: str,
) -> None:
    """uint16 holds ids up to 65,535; one more and the set is uint32, with the id intact."""
    layout = json.loads(bytes_tokenizer())
    layout["added_tokens"][0]["id"] = largest
    layout["model"]["vocab"] |= {f"filler{number}": number for number in range(256, largest)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    build_set(
        write_jsonl(["ab"]), tokenizer=str(tmp_path / "tokenizer.json"), validation_fraction=0
    )
    shards = ShardSet.open(tmp_path / "out", "train")
    assert str(shards.read(0, 3).dtype) == dtype == str(token_dtype(largest))
    assert shards.read(0, 3).tolist() == [97, 98, largest]
    assert shards.max_token_id == largest


def test_eos_is_found_or_asked_for(tmp_path: Path) -> None:
    """The usual names, tokenizer_config.json and --eos-token are tried; none is a clear error."""
    content = bytes_tokenizer().replace(END_OF_TEXT.encode(), b"<|stop|>")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="--eos-token"):
        read_tokenizer(tmp_path)
    with pytest.raises(DataError, match="'<nope>' is not in the vocabulary"):
        read_tokenizer(tmp_path, "<nope>")
    assert read_tokenizer(tmp_path, "<|stop|>").eos_id == 256
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    assert read_tokenizer(tmp_path / "tokenizer.json").eos_token == "<|stop|>"


@pytest.mark.parametrize("content", [None, b"{}", b"not json"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing file and one of another format each give one line with what to do."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="tokenizer") as caught:
        read_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_truncation_in_the_file_is_ignored() -> None:
    """A tokenizer.json saved with truncation and padding on must not cut documents."""
    library = tokenizers.Tokenizer.from_str(bytes_tokenizer().decode())
    library.enable_truncation(4)
    library.enable_padding(length=4)
    tokenizer = Tokenizer(library.to_str().encode(), None, "file")
    flat, _ = tokenizer.encode_documents(["abcdefgh", "a"])
    assert flat.tolist() == [*b"abcdefgh", 256, *b"a", 256]


@pytest.mark.parametrize("content", [BYTES.content, TRAINED.content], ids=["bytes", "trained"])
def test_special_tokens_become_ids_when_asked(content: bytes) -> None:
    """With "id" the text of a special token is that one id, and decoding still gives the text."""
    tokenizer = Tokenizer(content, None, "", "id")
    text = f"a{END_OF_TEXT}\nb"
    ids = tokenizer.encode_documents([text])[0].tolist()
    assert ids.count(tokenizer.eos_id) == 2
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer.find_special(text.encode()) == END_OF_TEXT
    assert tokenizer.find_special(b"a <|end of text|>") is None
