"""The fast encoder gives the ids of the library that defines them, or is not used."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import models

from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest
from data_prep.tokenization import encoder as encoder_module
from data_prep.tokenization.encoder import Encoder, EncoderChoice, EncoderName, choose_encoder
from data_prep.tokenization.tokenizer import (
    END_OF_TEXT,
    PART_CHARACTERS,
    SpecialTokens,
    Tokenizer,
    bytes_tokenizer,
    train_tokenizer,
)

PROSE = [f"The loss of step {n}\n  is {n * 7}: naïve <|endoftext|> text\r\n" for n in range(400)]
CONTENT = train_tokenizer(PROSE, 500)
MODES: tuple[SpecialTokens, ...] = ("text", "id")
PIECES = st.sampled_from([END_OF_TEXT, "<|end", "\n", "  ", " a", "'s", "7", "é", "数", "\r\n"])
TEXTS = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=60), st.lists(PIECES).map("".join)),
    min_size=1,
    max_size=5,
)


def changed(**parts: Any) -> bytes:
    """The trained tokenizer with other parts of its file."""
    return json.dumps(json.loads(CONTENT) | parts).encode()


def split_pattern(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer with another split regex."""
    steps = json.loads(CONTENT)["pre_tokenizer"]
    steps["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_the_trained_tokenizer_takes_the_fast_path(mode: SpecialTokens) -> None:
    """What train:V makes is known to gigatoken, whatever becomes of special tokens."""
    assert choose_encoder(Tokenizer(CONTENT, None, "", mode), "auto") == ("gigatoken", "")
    assert choose_encoder(Tokenizer(CONTENT, None, "", mode), "tokenizers").name == "tokenizers"


@settings(deadline=None, max_examples=50)
@given(texts=TEXTS)
@pytest.mark.parametrize("mode", MODES)
def test_all_encoders_give_the_same(mode: SpecialTokens, texts: list[str]) -> None:
    """Ids, EOS and lengths are those of `tokenizers` itself, for any Unicode text."""
    tokenizer = Tokenizer(CONTENT, None, "", mode)
    library = tokenizers.Tokenizer.from_str(CONTENT.decode())
    library.encode_special_tokens = mode != "id"
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    for name in ("gigatoken", "tokenizers"):
        flat, lengths = encoders(tokenizer, name).encode([text.encode() for text in texts])
        assert flat.tolist() == [id for ids in expected for id in [*ids, tokenizer.eos_id]]
        assert lengths.tolist() == [len(ids) + 1 for ids in expected]
        assert flat.dtype == tokenizer.dtype == np.uint16


_ENCODERS: dict[tuple[str, EncoderName], Encoder] = {}


def encoders(tokenizer: Tokenizer, name: EncoderName) -> Encoder:
    """One of each kind for all examples: the fast one keeps a cache from text to text."""
    return _ENCODERS.setdefault((tokenizer.special_tokens, name), Encoder(tokenizer, name))


def test_bytes_need_no_library() -> None:
    """The byte tokenizer is a copy of the text, unless special tokens become ids."""
    tokenizer = Tokenizer(bytes_tokenizer(), None, "bytes")
    assert choose_encoder(tokenizer, "auto") == ("bytes", "")
    flat, lengths = Encoder(tokenizer, "bytes").encode([b"ab", "é".encode()])
    assert flat.tolist() == [97, 98, 256, 195, 169, 256]
    assert lengths.tolist() == [3, 3]
    assert choose_encoder(Tokenizer(bytes_tokenizer(), None, "", "id"), "auto").name != "bytes"


def test_an_unknown_split_falls_back_with_the_reason() -> None:
    """A pattern that gigatoken does not know is encoded by tokenizers, which is said."""
    tokenizer = Tokenizer(changed(pre_tokenizer=split_pattern(r"\d+|\D+")), None, "")
    report = choose_encoder(tokenizer, "auto")
    assert report.name == "tokenizers"
    assert "gigatoken does not support this tokenizer" in report.note
    assert "Unknown pre_tokenizer" in report.note
    with pytest.raises(DataError, match=r"--encoder gigatoken: .*use --encoder auto"):
        choose_encoder(tokenizer, "gigatoken")


class Wrong:
    """A fast library with one id wrong in texts that hold a digit."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of `tokenizers`, one of them another."""
        ids, ends = self._tokenizer.encode_plain([text.decode() for text in texts])
        ids = ids.copy()
        for number, text in enumerate(texts):
            if b"7" in text:
                ids[ends[number] - 1] = self.wrong_id
        return ids, ends

    wrong_id = 5


def test_a_difference_in_the_probe_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that gives other ids before the start is not used, and the text is named."""
    monkeypatch.setattr(encoder_module, "_Gigatoken", Wrong)
    report = choose_encoder(Tokenizer(CONTENT, None, ""), "auto")
    assert report.name == "tokenizers"
    assert "gigatoken gives other ids for " in report.note


def test_a_difference_during_the_run_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sample each document is compared, and a difference ends the job."""
    monkeypatch.setattr(encoder_module, "_Gigatoken", Wrong)
    encoder = Encoder(Tokenizer(CONTENT, None, ""), "gigatoken")
    texts = [f"document {number} of 7" for number in range(3000)]
    with pytest.raises(DataError, match=r"disagree on a document: other ids for .*--encoder tok"):
        encoder.encode([text.encode() for text in texts])
    encoder.encode([b"no such digit"] * 10)


def test_ids_out_of_range_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that the vocabulary does not have is never stored, wrapped or not."""
    monkeypatch.setattr(encoder_module, "_Gigatoken", Wrong)
    monkeypatch.setattr(Wrong, "wrong_id", 500)
    encoder = Encoder(Tokenizer(CONTENT, None, ""), "gigatoken")
    with pytest.raises(DataError, match="gave the id 500, above the largest id"):
        encoder.encode([b"7"])


def test_a_lossy_tokenizer_is_not_decoded_back() -> None:
    """Lower-casing loses text by design, so only the ids are compared."""
    tokenizer = Tokenizer(changed(normalizer={"type": "Lowercase"}), None, "")
    assert tokenizer.why_lossy == "it normalizes text"
    report = choose_encoder(tokenizer, "auto")
    texts = [f"Document {number}".encode() for number in range(3000)]
    encoder = Encoder(tokenizer, report.name)
    flat, _ = encoder.encode(texts)
    assert len(flat) > len(texts)
    assert encoder.sampled == encoder.altered > 0, "each begins with a capital letter"


@pytest.mark.parametrize(
    ("parts", "is_lossless"),
    [
        ({}, True),
        ({"decoder": None}, False),
        ({"pre_tokenizer": {"type": "Whitespace"}}, False),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            False,
        ),
    ],
)
def test_what_is_lossless_is_known_from_the_layout(
    parts: dict[str, Any], is_lossless: bool
) -> None:
    """Byte-level pieces without a normalizer or an added space give every text back."""
    assert (Tokenizer(changed(**parts), None, "").why_lossy == "") is is_lossless


def with_token(name: str, special: bool = False) -> bytes:
    """The trained tokenizer with one more token beside its vocabulary."""
    layout = json.loads(CONTENT)
    number = max(layout["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    layout["added_tokens"].append({"id": number, "content": name, "special": special, **flags})
    return json.dumps(layout).encode()


@pytest.mark.parametrize("encoder", ["auto", "tokenizers"])
def test_an_added_token_with_letters_that_stand_for_bytes(encoder: EncoderChoice) -> None:
    """Its name decodes to other bytes: that is known of the tokenizer, and no document's fault."""
    texts = [f"Das heißt {number}".encode() for number in range(3000)]
    tokenizer = Tokenizer(with_token("heißt"), None, "")
    assert tokenizer.why_lossy == "the added token 'heißt' decodes to something else"
    name = choose_encoder(tokenizer, encoder).name
    used = Encoder(tokenizer, name)
    used.encode(texts)
    assert used.sampled == used.altered > 0
    assert not Tokenizer(with_token("heisst"), None, "").why_lossy


def test_added_tokens_are_probed() -> None:
    """Ids of added tokens are compared, too: the library numbers them anew, the fast one does not.

    Without the probe a build would fail at the first document that spells one.
    """
    layout = json.loads(with_token("<tool>"))
    layout["added_tokens"][-1]["id"] += 5
    tokenizer = Tokenizer(json.dumps(layout).encode(), None, "")
    report = choose_encoder(tokenizer, "auto")
    assert report.name == "tokenizers"
    Encoder(tokenizer, report.name).encode([b"a <tool> b"])


def test_a_token_over_a_line_end_is_not_cut() -> None:
    """A giant text is encoded in parts only where no token can span the cut."""
    text = f"{'loss ' * (1 << 18)}\nStep".ljust(PART_CHARACTERS + 100, "x") + "\nStep end"
    tokenizer = Tokenizer(with_token("\nStep"), None, "")
    library = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    assert tokenizer.encode_plain([text])[0].tolist() == library.encode(text).ids


def test_a_disagreement_of_one_library_with_itself_is_not_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When text does not come back from the defining library, that is what the message says."""
    tokenizer = Tokenizer(CONTENT, None, "")
    monkeypatch.setattr(tokenizer, "decode", lambda _: "something else")
    texts = [f"document {number}".encode() for number in range(3000)]
    with pytest.raises(DataError, match=r"the ids that tokenizers gives for .* do not decode"):
        Encoder(tokenizer, "tokenizers").encode(texts)


def unigram(end_is_special: bool) -> bytes:
    """A Unigram model, which finds every piece of its vocabulary in text, "</s>" among them."""
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz <>/"]
    model = models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *letters], unk_id=0)
    backend = tokenizers.Tokenizer(model)
    if end_is_special:
        backend.add_special_tokens([tokenizers.AddedToken("</s>", special=True)])
    return str(backend.to_str()).encode()


@pytest.mark.parametrize(
    ("content", "eos", "way_out"),
    [
        (unigram(end_is_special=True), None, "--special-tokens reject"),
        (unigram(end_is_special=False), None, "name a special token with --eos-token"),
        (CONTENT, "s", "name a special token with --eos-token"),
        (train_tokenizer(["a stop "] * 99, 270), "Ġstop", ""),
    ],
)
def test_an_end_that_is_ordinary_text_is_refused(
    content: bytes, eos: str | None, way_out: str
) -> None:
    """Text would end documents; what the first look misses ends the build at the document."""
    tokenizer = Tokenizer(content, eos, "t.json")
    if way_out:
        with pytest.raises(DataError, match=f"t.json encodes the text .*{way_out}"):
            tokenizer.check_end("t.json")
    name = choose_encoder(tokenizer, "auto").name
    with pytest.raises(DataError, match=r"encodes text of .* as its end-of-document token"):
        Encoder(tokenizer, name).encode([b"a", b"do not stop at </s> here"])
    if way_out == "--special-tokens reject":
        for mode in ("id", "reject"):
            Tokenizer(content, eos, "t.json", mode).check_end("t.json")


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_an_end_that_its_file_does_not_call_special_is(name: EncoderName) -> None:
    """A token beside the vocabulary that ends documents is never found in text."""
    tokenizer = Tokenizer(with_token("<fin>"), "<fin>", "")
    tokenizer.check_end("t.json")
    flat, lengths = Encoder(tokenizer, name).encode([b"a <fin> b", b"<fin>"])
    assert np.flatnonzero(flat == tokenizer.eos_id).tolist() == (np.cumsum(lengths) - 1).tolist()
    assert tokenizer.find_special(b"a <fin>") == "<fin>"
    assert Tokenizer(CONTENT, None, "").eos_id != tokenizer.eos_id


def test_the_cache_of_the_fast_library_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it took much memory it is loaded again, and gives the same ids."""
    # Memory that earlier tests gave back may hold all of the cache: none is enough here.
    monkeypatch.setattr(encoder_module, "CACHE_GROWTH_BYTES", -1)
    loads = []
    load = encoder_module._Gigatoken._load

    def watch(self: encoder_module._Gigatoken) -> Any:
        loads.append(self)
        return load(self)

    monkeypatch.setattr(encoder_module._Gigatoken, "_load", watch)
    tokenizer = Tokenizer(CONTENT, None, "")
    encoder = Encoder(tokenizer, "gigatoken")
    rng = np.random.default_rng(3)
    words = rng.integers(97, 123, size=(40_000, 10), dtype=np.uint8)
    words[:, -1] = ord(" ")
    text = words.tobytes()
    first = encoder.encode([text])[0]
    second = encoder.encode([text])[0]
    assert len(loads) > 1
    assert np.array_equal(first, second)


def test_the_encoder_changes_no_byte(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    read_tree: Callable[[Path], dict[str, bytes]],
    texts: list[str],
) -> None:
    """Sets of both libraries are the same to the byte, and one resumes where the other stopped."""
    path = write_jsonl(texts)
    for encoder in ("gigatoken", "tokenizers"):
        build_set(path, output=encoder, tokenizer="train:300", encoder=encoder)
    trees = [read_tree(tmp_path / encoder) for encoder in ("gigatoken", "tokenizers")]
    assert trees[0] == trees[1]
    (tmp_path / "gigatoken" / "manifest.json").unlink()
    build_set(path, output="gigatoken", tokenizer="train:300", encoder="tokenizers")
    assert read_tree(tmp_path / "gigatoken") == trees[0]
