"""`generate(decoder=...)` of the class that exports carry: the texts of the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, NoRepeatNGramLogitsProcessor

from model.hugging_face.modeling_headway import HeadwayForCausalLM, HeadwayLinearForCausalLM
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, export_tiny
from tests.support.written_texts import output, printed_ids

TEXTS = ["ab", "import"]
# In transformers 4 top_k is 50 unless given.
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_k": 30}


@pytest.fixture(scope="module")
def model(export: Path) -> HeadwayForCausalLM:
    """The same in transformers."""
    return HeadwayForCausalLM.from_pretrained(export).eval()


def written(model: HeadwayForCausalLM, **settings: Any) -> list[list[int]]:
    """The new tokens after each prompt, padded on the left, up to the end of each text."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(ids, attention_mask=mask, pad_token_id=259, **settings)
    assert torch.equal(found[:, :longest], ids)
    return [[token for token in row if token != 259] for row in found[:, longest:].tolist()]


def _command(capsys: pytest.CaptureFixture[str], export: Path, *options: str) -> list[list[int]]:
    prompts = [part for text in TEXTS for part in ("--prompt", text)]
    return printed_ids(
        output(capsys, str(export), *prompts, "--ids", "--max-new-tokens", "14", *options)
    )


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"decoder": "beam", "do_sample": False, "beam_width": 3}, ["--beam-width", "3"]),
        ({"decoder": "beam", "distinct_beams": True, **DRAWN}, ["--distinct-beams"]),
        (
            {"decoder": "dsbd", "beam_width": 3, "min_width": 2, **DRAWN},
            ["--beam-width", "3", "--min-width", "2"],
        ),
        ({"decoder": "dsbd", "num_heads": 2, "one_beam": True, **DRAWN}, ["--one-beam"]),
        ({"decoder": "mtad", "do_sample": False, "tau": 0.2}, ["--tau", "0.2"]),
        (
            {"decoder": "mtad", "candidates": 2, "repetition_penalty": 1.3, **DRAWN},
            ["--candidates", "2", "--repetition-penalty", "1.3"],
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_texts_are_those_of_the_command(
    model: HeadwayForCausalLM,
    export: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    options: list[str],
) -> None:
    """For each row of a batch, by its seed and the number of heads."""
    options = ["--decoder", settings["decoder"], *options]
    options += ["--seed", "7"]
    if settings["do_sample"]:
        options += ["--temperature", "1.2", "--top-k", "30"]
    if "num_heads" in settings:
        options += ["--heads", str(settings["num_heads"])]
    expected = _command(capsys, export, *options)
    assert written(model, max_new_tokens=14, seed=7, **settings) == expected
    if settings["do_sample"]:
        assert written(model, max_new_tokens=14, seed=8, **settings) != expected


@pytest.mark.parametrize("decoder", ["dsbd", "mtad"])
def test_another_model_drafts(
    model: HeadwayForCausalLM,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    decoder: str,
) -> None:
    """A plain Llama that transformers has loaded, and one with heads, of which it takes head 1."""
    draft = tmp_path / "draft"
    export_tiny(draft, layers=4, future_tokens=2)
    options = ["--decoder", decoder, "--draft", str(draft), "--drafts", "3", "--temperature", "1.2"]
    expected = _command(capsys, export, *options, "--top-k", "30")
    for kind in (LlamaForCausalLM, HeadwayForCausalLM):
        settings = {**DRAWN, "draft_model": kind.from_pretrained(draft), "drafts": 3}
        assert written(model, decoder=decoder, max_new_tokens=14, **settings) == expected


@pytest.mark.parametrize(
    "sizes",
    [{"head_kind": "causal"}, {"head_kind": "anticausal"}, {"head_kind": "linear"}],
    ids=lambda sizes: str(sizes["head_kind"]),
)
def test_every_kind_of_heads_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, Any]
) -> None:
    """The model in memory is read as its folder is."""
    directory = tmp_path / "export"
    export_tiny(directory, lm_head="replicated", **sizes)
    linear = sizes["head_kind"] == "linear"
    kind = HeadwayLinearForCausalLM if linear else HeadwayForCausalLM
    model = kind.from_pretrained(directory).eval()
    options = ["--decoder", "dsbd", "--temperature", "1.2", "--top-k", "30"]
    expected = _command(capsys, directory, *options)
    assert written(model, decoder="dsbd", max_new_tokens=14, **DRAWN) == expected


def test_weights_are_those_of_the_moment(export: Path) -> None:
    """A model that has changed since the last call gives another text."""
    model = HeadwayForCausalLM.from_pretrained(export).eval()
    before = written(model, decoder="beam", max_new_tokens=14, do_sample=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert written(model, decoder="beam", max_new_tokens=14, do_sample=False) != before


def test_returned_as_a_dictionary(model: HeadwayForCausalLM) -> None:
    """If asked for; and several texts of a prompt are drawn by their own seeds."""
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"decoder": "mtad", "max_new_tokens": 9, "pad_token_id": 259, **DRAWN}
    found = model.generate(
        prompt, num_return_sequences=3, return_dict_in_generate=True, **settings
    ).sequences
    assert len({tuple(row) for row in found.tolist()}) == 3
    second = model.generate(prompt, seed=1, **settings)
    assert torch.equal(found[1:2, : second.shape[1]], second)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decoder": "tree"}, "decoder: tree is none; give beam, dsbd or mtad"),
        ({"decoder": "beam", "tau": 0.5}, "tau: is of the decoder mtad, which beam does not have"),
        ({"decoder": "beam", "beam_width": 65}, "beam_width: 65 must be from 1 to 64"),
        ({"decoder": "dsbd", "do_sample": False}, "temperature: 0 leaves the decoder dsbd nothing"),
        ({"decoder": "dsbd", "num_heads": 1}, "decoder: dsbd needs somebody who drafts"),
        ({"decoder": "mtad", "num_heads": 5}, "num_heads=5 must be from 1 to 4"),
        ({"decoder": "beam", "num_heads": 2}, "decoder='beam' has no drafts, so it goes without"),
        ({"decoder": "mtad", "drafts": 0}, "drafts=0 must be a whole number from 1 to 64"),
        ({"decoder": "mtad", "drafts": "2"}, "drafts=2 must be a whole number from 1 to 64"),
        ({"decoder": "mtad", "seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"decoder": "mtad", "seed": None}, "seed=None must be a whole number from 0"),
        ({"decoder": "mtad", "draft_model": "folder"}, "draft_model must be a model that"),
        ({"decoder": "beam", "beam_width": "4"}, "beam_width: '4' must be a whole number"),
        ({"decoder": "beam", "beam_width": True}, "beam_width: True must be a whole number"),
        ({"decoder": "mtad", "tau": "all"}, "tau: 'all' must be a number"),
        ({"decoder": "dsbd", "one_beam": 1}, "one_beam: 1 must be true or false"),
        ({"decoder": "beam", "num_beams": 2}, "what makes it beam_"),
        ({"decoder": "beam", "no_repeat_ngram_size": 2}, "what makes a NoRepeatNGramLogits"),
        ({"decoder": "beam", "output_scores": True}, "which output_scores does not go with"),
        ({"decoder": "mtad", "max_time": 1.0}, "what makes a MaxTimeCriteria does not go with"),
        (
            {"decoder": "mtad", "logits_processor": [NoRepeatNGramLogitsProcessor(2)]},
            "what makes a NoRepeatNGramLogitsProcessor",
        ),
        (
            {"decoder": "beam", "attention_mask": torch.tensor([[0, 0]])},
            "inputs: have a row without",
        ),
        ({"decoder": "dsbd", "max_new_tokens": 0}, "max_new_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_meant_is_refused(
    model: HeadwayForCausalLM, settings: dict[str, Any], words: str
) -> None:
    """In one line that names it and the way out."""
    settings = {"do_sample": True, "max_new_tokens": 5, "pad_token_id": 0} | settings
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as raised:
        model.generate(torch.tensor([[5, 6]]), **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("decoder", ["beam", "dsbd", "mtad"])
def test_odd_inputs(model: HeadwayForCausalLM, decoder: str) -> None:
    """Each has its text, or one clear error."""
    settings = {"decoder": decoder, "pad_token_id": 0, **DRAWN}
    one = model.generate(torch.tensor([[5, 6]]), max_new_tokens=1, **settings)
    assert one.shape == (1, 3)
    ends = list(range(VOCABULARY))
    first = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, eos_token_id=ends, **settings)
    assert first.shape == (1, 3)
    # The model was trained on 64 positions.
    assert model.generate(torch.full((1, 64), 9), max_new_tokens=1, **settings).shape == (1, 65)
    assert model.generate(torch.full((2, 70), 9), max_new_tokens=3, **settings).shape == (2, 73)
    for inputs, words in (
        (torch.zeros(1, 0, dtype=torch.long), "inputs: have a row without a token"),
        (torch.tensor([[5, VOCABULARY]]), "inputs: have token 260, and the model knows 0 to 259"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(inputs, max_new_tokens=3, **settings)


def test_a_draft_model_of_another_vocabulary_is_refused(
    model: HeadwayForCausalLM, tmp_path: Path
) -> None:
    """It has another tokenizer, too."""
    config = model.config.to_dict() | {"vocab_size": VOCABULARY + 4, "future_tokens": 1}
    other = LlamaForCausalLM(type(model.config)(**config))
    with pytest.raises(ValueError, match="draft_model drafts instead of the heads; leave it or"):
        model.generate(
            torch.tensor([[5, 6]]), decoder="mtad", draft_model=other, num_heads=2, **DRAWN
        )
    with pytest.raises(ValueError, match="draft_model: has a vocabulary of 264, the model one of"):
        model.generate(
            torch.tensor([[5, 6]]), decoder="mtad", draft_model=other, max_new_tokens=3, **DRAWN
        )
