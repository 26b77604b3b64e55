"""Greedy decoders against a loop written out on plain transformers, over many ragged rows."""

import functools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers

from model.decoding.batch import Decoder
from model.decoding.chain import ChainDecoder
from model.decoding.generation import collect, stream
from model.decoding.tree import TreeDecoder
from model.inference.loading import load_network
from model.inference.network import Network
from pipeline.exporting.writing import write_export
from tests.support.long_forms import part_of
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, describe, export_tiny
from tests.support.tiny_model import tiny_config, tiny_weights

SCALE = 1.0  # of the layers that add to an embedding
LIMIT = 24


class Case(NamedTuple):
    """A batch of rows for one decoder."""

    weights: str
    heads: int
    rows: int


CASES = [
    *(Case(weights, heads, 24) for weights in ("random", "agreeing") for heads in (1, 2, 3, 4)),
    *(Case(weights, heads, 1000) for weights in ("random", "agreeing") for heads in (1, 2, 3, 4)),
]
DECODERS: dict[str, Callable[[Network, int], Decoder]] = {
    "chain": lambda network, heads: ChainDecoder(network, heads=heads),
    "tree": lambda network, heads: TreeDecoder(network, heads=heads, spread=2),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export whose heads know nothing, and one whose drafts are often right."""
    folder = tmp_path_factory.mktemp("equality")
    export_tiny(folder / "random")
    write_export(
        folder / "agreeing",
        describe(tiny_config(vocab_size=VOCABULARY)),
        agreeing().items(),
        tokenizer=byte_tokenizer(),
    )
    return {name: folder / name for name in ("random", "agreeing")}


def agreeing() -> dict[str, torch.Tensor]:
    """A model that likes to repeat itself, in all its heads, with changes now and then.

    Layers add little to the embedding of a token, and the LM head finds that token in it. As with a
    trained model many drafts are right, and many are not.
    """
    config = tiny_config(vocab_size=VOCABULARY)
    weights = {name: SCALE * w if w.dim() > 1 else w for name, w in tiny_weights(config).items()}
    generator = torch.Generator().manual_seed(4)
    embedding = torch.randn(VOCABULARY, config.hidden_size, generator=generator)
    weights["trunk.embedding.weight"] = embedding
    weights["heads.readout.weight"] = embedding
    return weights


def prompts_of(rows: int) -> list[list[int]]:
    """Prompts of 1 to 90 tokens; the model was trained on sequences of 64."""
    chance = random.Random(rows)
    return [
        [chance.randrange(256) for _ in range(chance.choice((1, 2, 5, 17, 40, 90)))]
        for _ in range(rows)
    ]


@torch.no_grad()
def plain_loop(model: torch.nn.Module, prompt: list[int], eos_id: int | None) -> list[int]:
    """Greedy decoding token by token with the cache of transformers."""
    tokens: list[int] = []
    past, inputs = None, torch.tensor([prompt])
    while len(tokens) < LIMIT and eos_id not in tokens:
        out = model(inputs, past_key_values=past, use_cache=True)
        past = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
        inputs = torch.tensor([tokens[-1:]])
    return tokens


@functools.cache
def expected_texts(folder: Path, rows: int) -> tuple[int, list[list[int]]]:
    """An end-of-text token that comes in several of the texts, and the texts up to it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    prompts = prompts_of(rows)
    first = [plain_loop(model, prompt, None) for prompt in prompts[:24]]
    counts = Counter(token for text in first for token in set(text[1:]))
    [(eos_id, count)] = counts.most_common(1)
    assert count > 1
    return eos_id, [plain_loop(model, prompt, eos_id) for prompt in prompts]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("case", part_of(CASES, lambda _, case: case.rows < 100))
def test_greedy_texts_are_those_of_a_plain_loop(
    exports: dict[str, Path], case: Case, decoder: str
) -> None:
    """Token for token, whatever ends the rows and wherever in a block, in one ragged batch."""
    folder = exports[case.weights]
    network = load_network(folder, torch.float64).network
    eos_id, expected = expected_texts(folder, case.rows)
    pieces = stream(
        DECODERS[decoder](network, case.heads),
        prompts_of(case.rows),
        max_new_tokens=LIMIT,
        eos_id=eos_id,
    )
    found = collect(pieces, case.rows)
    assert found.tokens == expected
    assert len({len(tokens) for tokens in expected}) > 2
    if case.weights == "agreeing" and case.heads > 1:
        assert found.tokens_per_forward > 1.1
