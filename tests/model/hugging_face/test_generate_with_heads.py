"""`generate(num_heads=K)` of the class that exports carry: the texts of plain `generate`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextStreamer,
)

from model.beams.hypotheses import BeamSettings
from model.beams.search import beam_search
from model.hugging_face import modeling_headway
from model.hugging_face.modeling_headway import HeadwayForCausalLM
from model.inference.loading import load_network
from tests.support.tiny_export import VOCABULARY, export_tiny

PERIOD = 11
PROMPTS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long()
# Without an end of text, so that texts are as long as they were asked to be.
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> HeadwayForCausalLM:
    """Four heads whose drafts are hardly ever right."""
    directory = tmp_path_factory.mktemp("untrained") / "export"
    export_tiny(directory)
    return HeadwayForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> HeadwayForCausalLM:
    """The same after some steps on periodic texts: drafts are right often, and not always."""
    directory = tmp_path_factory.mktemp("trained") / "export"
    export_tiny(directory)
    model = HeadwayForCausalLM.from_pretrained(directory).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        texts = _periodic(torch.randint(PERIOD, (8,), generator=generator), 24)
        noise = torch.rand(texts.shape, generator=generator) < 0.1
        texts = torch.where(noise, (texts + 1) % PERIOD, texts)
        model(texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _periodic(start: Tensor, length: int) -> Tensor:
    return (start.unsqueeze(1) + 3 * torch.arange(length)) % PERIOD


@pytest.fixture(params=["trained", "untrained"])
def model(request: pytest.FixtureRequest) -> HeadwayForCausalLM:
    """Either of them."""
    model: HeadwayForCausalLM = request.getfixturevalue(request.param)
    return model


@contextmanager
def _counted(model: HeadwayForCausalLM) -> Iterator[list[int]]:
    """New positions of each forward of the trunk."""
    sizes: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[1])
    )
    yield sizes
    hook.remove()


def _both(model: HeadwayForCausalLM, heads: int, **settings: Any) -> tuple[Any, Any]:
    """What `generate` gives with drafts and without."""
    settings = {"inputs": PROMPTS, "attention_mask": MASK, "max_new_tokens": 20} | settings
    settings = GREEDY | settings
    return model.generate(num_heads=heads, **settings), model.generate(**settings)


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_greedy_texts_are_those_without_drafts(model: HeadwayForCausalLM, heads: int) -> None:
    """Padded batches and single rows, of any number of heads, token for token."""
    assert torch.equal(*_both(model, heads))
    for row in PROMPTS:
        alone = {"inputs": row.unsqueeze(0), "attention_mask": None, "max_new_tokens": 33}
        assert torch.equal(*_both(model, heads, **alone))


def test_drafts_save_forwards(trained: HeadwayForCausalLM) -> None:
    """A block commits several tokens; no forward is longer than what there is room for."""
    prompt = _periodic(torch.tensor([4]), 12)
    with _counted(trained) as sizes:
        text = trained.generate(prompt, max_new_tokens=30, num_heads=4, **GREEDY)
    assert text.shape == (1, 42)
    assert len(sizes) <= 15
    assert sizes[0] == 12
    assert max(sizes[1:]) == 4
    with _counted(trained) as sizes:
        trained.generate(prompt, max_new_tokens=2, num_heads=4, **GREEDY)
    assert sizes == [12, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": [0, 3, 77, 150], "max_new_tokens": 30},
        {"eos_token_id": [0, 3, 77, 150], "min_new_tokens": 9},
        {"eos_token_id": 5, "pad_token_id": None},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [6, 9]]},
        {"max_length": 17, "max_new_tokens": None},
        {"max_new_tokens": 1},
        {"forced_eos_token_id": 9},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, VOCABULARY, 2))},
        {"num_return_sequences": 1, "renormalize_logits": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_ends_and_processors_are_where_they_were(
    trained: HeadwayForCausalLM, settings: dict[str, Any]
) -> None:
    """An end of text or a limit inside a block cuts it; processors see each position's past."""
    assert torch.equal(*_both(trained, 4, **settings))


class _Seen(LogitsProcessor, StoppingCriteria):
    """Records what a processor, a criterion and a streamer are shown; stops at a token."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.lengths: list[int] = []
        self.put_tokens: list[int] = []
        self.ended = 0

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        if isinstance(scores, Tensor):
            self.lengths.append(input_ids.shape[1])
            scores[:, 2] += 0.5  # in place, as some do
            return scores
        return input_ids[:, -1] == self.stop

    def put(self, tokens: Tensor) -> None:
        self.put_tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_processors_criteria_and_streamers_see_each_token_once(model: HeadwayForCausalLM) -> None:
    """In order and without drafts, as they do in plain `generate`; so they may keep a state."""
    stop = int(_both(model, 1, inputs=PROMPTS[:1], attention_mask=None)[0][0, 17])
    seen = {heads: _Seen(stop) for heads in (1, 4)}
    texts = [
        model.generate(
            PROMPTS[:1],
            max_new_tokens=25,
            num_heads=heads,
            logits_processor=[one],
            stopping_criteria=[one],
            streamer=one,
            **GREEDY,
        )
        for heads, one in seen.items()
    ]
    assert torch.equal(*texts)
    assert vars(seen[1]) == vars(seen[4])
    assert seen[4].lengths == list(range(9, texts[0].shape[1]))
    assert seen[4].put_tokens == texts[0][0].tolist()


def test_what_a_dictionary_holds(model: HeadwayForCausalLM) -> None:
    """Scores and logits of every new token, and a cache that plain `generate` goes on from."""
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, plain = _both(model, 3, repetition_penalty=1.2, **wanted)
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "logits"):
        found, expected = torch.stack(ours[name]), torch.stack(plain[name])
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)  # fp32, logits up to 20
    longer = torch.cat([MASK, MASK.new_ones(3, 20)], dim=1)
    more = {"attention_mask": longer, "max_new_tokens": 5, **GREEDY}
    assert ours.past_key_values.get_seq_length() == 28
    assert torch.equal(
        model.generate(ours.sequences, past_key_values=ours.past_key_values, **more),
        model.generate(plain.sequences, past_key_values=plain.past_key_values, **more),
    )


def test_stop_strings_and_text_streamers(
    trained: HeadwayForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tokenizer, which transformers does not hand on to a loop that is not its own."""
    export_tiny(tmp_path / "export")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "export" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    prompt = _periodic(torch.tensor([4]), 12)
    plain = trained.generate(prompt, max_new_tokens=12, **GREEDY)
    stop = tokenizer.decode(plain[0, 16:18])
    settings = {"inputs": prompt, "attention_mask": None, "tokenizer": tokenizer}
    for given in ({"stop_strings": [stop]}, {"stop_strings": stop}, {}):
        ours, expected = _both(trained, 4, **settings, **given)
        assert torch.equal(ours, expected)
        assert (ours.shape[1] < 32) == bool(given)
    streamer = TextStreamer(tokenizer)
    capsys.readouterr()
    text = trained.generate(prompt, max_new_tokens=9, num_heads=4, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out == tokenizer.decode(text[0]) + "\n"


def test_numbers_and_arguments_that_are_refused(untrained: HeadwayForCausalLM) -> None:
    """One line with the rule; without num_heads the same arguments are transformers' affair."""
    wrong: list[Any] = [0, 5, -1, 2.5, "2"]
    for heads in wrong:
        with pytest.raises(ValueError, match=rf"num_heads={heads} must be from 1 to 4"):
            untrained.generate(PROMPTS, num_heads=heads, **GREEDY)
    cache = untrained(PROMPTS).past_key_values
    for argument, value in {
        "past_key_values": cache,
        "assistant_model": untrained,
        "custom_generate": lambda *_, **__: None,
        "synced_gpus": True,
        "output_hidden_states": True,
        "num_beams": 2,
        "prompt_lookup_num_tokens": 2,
    }.items():
        name = "beam_search" if argument == "num_beams" else argument
        name = "assisted_generation" if argument == "prompt_lookup_num_tokens" else name
        given = {argument: value, "return_dict_in_generate": True}
        with pytest.raises(ValueError, match=rf"num_heads=2 .* leave out .*{name}"):
            untrained.generate(PROMPTS[:1], max_new_tokens=3, num_heads=2, **(GREEDY | given))
    embedded = untrained.model.embed_tokens(PROMPTS)
    with pytest.raises(ValueError, match="leave out inputs_embeds"):
        untrained.generate(inputs_embeds=embedded, num_heads=2, **GREEDY)


def test_beams_are_those_of_head_1(tmp_path: Path) -> None:
    """`num_beams` is transformers' own search, which finds what ours does; drafts go without it."""
    export_tiny(tmp_path)
    model = HeadwayForCausalLM.from_pretrained(tmp_path).eval()
    loaded = load_network(tmp_path)
    settings = BeamSettings(3, 8, eos_ids=frozenset({256}))
    found = beam_search(loaded.network, PROMPTS.tolist(), settings)
    for heads in ({}, {"num_heads": 1}):
        texts = model.generate(
            PROMPTS, num_beams=3, max_new_tokens=8, eos_token_id=256, pad_token_id=257, **heads
        )
        for tokens, text in zip(found.tokens, texts.tolist(), strict=True):
            assert tokens == [token for token in text[PROMPTS.shape[1] :] if token != 257]


def _misfit(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square over its expectation's 6-sigma limit: above 1, these are not draws of that law."""
    expected = probabilities * counts.sum()
    assert float(expected.min()) > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return statistic / (freedom + 6 * math.sqrt(2 * freedom))


SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.5,
    "top_k": 3,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def _texts(model: HeadwayForCausalLM, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """All texts of three tokens that can be sampled `[T, 3]`, and their probabilities `[T]`."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, probability in found.items():
            ids = torch.cat([prompt, torch.tensor([text], dtype=torch.long)], dim=1)
            values, best = (model(ids).logits[0, -1] / 1.5).topk(3)
            for token, p in zip(best.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*text, token)] = probability * p
        found = longer
    return torch.tensor(list(found)), torch.tensor(list(found.values()), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 40])
def test_sampled_texts_have_the_law_of_plain_sampling(
    trained: HeadwayForCausalLM, rows: int
) -> None:
    """Against every text's probability; alone several drafts are kept, in batches few."""
    prompt = _periodic(torch.tensor([4]), 6)
    texts, law = _texts(trained, prompt)
    rare = law < 0.03
    torch.manual_seed(3)
    counts = torch.zeros(len(texts))
    for _ in range(300 if rows == 1 else 20):
        many = prompt.expand(rows, -1)
        new = trained.generate(many, max_new_tokens=3, num_heads=4, **SAMPLED)[:, 6:]
        same = (new.unsqueeze(1) == texts).all(-1)
        assert same.any(1).all(), "a text that cannot be sampled"
        counts += same.sum(0)
    counts = torch.cat([counts[~rare], counts[rare].sum().reshape(1)])
    law = torch.cat([law[~rare], law[rare].sum().reshape(1)])
    assert _misfit(counts, law) < 1


@pytest.mark.parametrize("fault", [None, "keeps all", "draws anew", "draws from p"])
def test_the_acceptance_rule(fault: str | None) -> None:
    """Drafts of one law make tokens of another; each part of the rule is needed for it."""
    generator = torch.Generator().manual_seed(4)
    target, proposal = torch.rand(2, 6, generator=generator).softmax(-1)
    target[0], proposal[1] = 0.0, 0.02
    target, proposal = target / target.sum(), proposal / proposal.sum()
    rows = 20_000
    torch.manual_seed(5)
    drafts = torch.multinomial(proposal, rows, replacement=True)
    p, q = target.expand(rows, -1), proposal.expand(rows, -1)
    tokens = modeling_headway._accept_or_draw(p, drafts, q)
    if fault == "keeps all":
        tokens = drafts
    elif fault == "draws from p":
        tokens = torch.where(tokens == drafts, drafts, torch.multinomial(target, rows, True))
    elif fault == "draws anew":
        tokens = torch.where(tokens == drafts, drafts, torch.multinomial(proposal, rows, True))
    counts = torch.bincount(tokens, minlength=6).float()
    if fault is None:
        assert counts[0] == 0
    assert (_misfit(counts[1:], target[1:].double()) < 1) == (fault is None)
