"""The study of memories: streams are what they say, and losses and recalls those of the model."""

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.studies.grid import load_grid
from benchmarks.studies.hmt.documents import FILLER, streams, taking_turns
from benchmarks.studies.hmt.reading import (
    losses_in_windows,
    losses_with_memory,
    losses_without_memories,
    most_bytes,
    recalls,
)
from benchmarks.studies.runner import plan_run
from model.language_model import MultiTokenModel
from tests.benchmarks.test_studies import STUDIES
from tests.support.plain_memory import PlainMemoryModel
from tests.support.tiny_export import byte_tokenizer
from tests.support.tiny_model import tiny_config, tiny_network, tiny_weights, training_model

MEMORY = {"segment": 6, "summary": 4, "sensory": 2, "cache": 3}


def test_two_texts_take_turns() -> None:
    """Whole lines, each turn of about a segment; nothing is lost but what has no counterpart."""
    first, second = ("".join(f"{name} {n:03d}\n" for n in range(90)) for name in ("a", "bb"))
    text = taking_turns(first, second)
    turns = [
        "".join(lines) for _, lines in itertools.groupby(text.splitlines(), lambda line: line[0])
    ]
    assert len(turns) >= 6
    for name, original in (("a", first), ("b", second)):
        own = [line for line in text.splitlines(keepends=True) if line[0] == name]
        assert original.startswith("".join(own))
    assert all(100 < len(turn) < 200 for turn in turns)


def test_streams_switch_at_segments() -> None:
    """Between two texts, or between text and filler, which is no target."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    found = streams(tokenizer, ["a" * 50, "b" * 50], length=21, segment=4)
    spelled = {
        kind: [tokenizer.decode(row.tolist()) for row in stream.tokens]
        for kind, stream in found.items()
    }
    assert spelled["concatenated"] == ["a" * 21, "b" * 21]
    assert spelled["interleaved"] == ["aaaabbbb" * 2 + "aaaab"]
    assert spelled["diluted"] == [f"{c * 4}{FILLER * 4}" * 2 + f"{c * 4}{FILLER}" for c in "ab"]
    own = found["diluted"].tokens != tokenizer.encode(FILLER).ids[-1]
    assert torch.equal(found["diluted"].counted, own)


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(4))


def _losses(model: MultiTokenModel, tokens: torch.Tensor) -> torch.Tensor:
    """Of head 1 over a whole text `[S]`."""
    with torch.no_grad():
        trunk_output = model(tokens[None, :-1])
        logits = model.all_logits(trunk_output, model.heads_context(trunk_output))[0, :, 0]
    return -logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def test_losses_of_a_window_see_what_is_in_it() -> None:
    """The first window gives all of its positions, later ones the last ones; each position once."""
    model, tokens = training_model(), _tokens(2, 21)
    found = losses_in_windows(model, tokens, window=8, stride=4)
    assert found.shape == (2, 20)
    for row in range(2):
        for position in range(20):
            start = 0 if position < 8 else (position - 8) // 4 * 4 + 4
            alone = _losses(model, tokens[row, start : position + 2])
            torch.testing.assert_close(found[row, position], alone[-1])


def test_losses_and_recalls_with_a_memory() -> None:
    """Those of the whole model; recalled is the memory with the largest share by the equations."""
    model, tokens = training_model(memory=MEMORY), _tokens(2, 31)
    found = losses_with_memory(model, tokens)
    numbers, shares = recalls(model, tokens[:, :30])
    assert numbers.shape == shares.shape == (3, 2)
    for row in range(2):
        torch.testing.assert_close(found[row], _losses(model, tokens[row]))
        plain = PlainMemoryModel(
            model.config, {n: w.double() for n, w in tiny_weights(model.config).items()}
        )
        reading = plain.read(tokens[row, :30])
        for place, number in enumerate(numbers[:, row].tolist()):
            kept = range(max(0, place + 2 - 3), place + 2)
            prompt, memories = reading.prompts[place + 2], [reading.memories[n] for n in kept]
            weights = torch.linalg.lstsq(torch.stack(memories).T, prompt[:, None]).solution[:, 0]
            assert number == kept[int(weights.argmax())]
            torch.testing.assert_close(shares[place, row], weights.max(), atol=1e-9, rtol=0)


def test_losses_without_memories() -> None:
    """Every segment is read as the first of a stream, sensory tokens before it."""
    model, tokens = training_model(memory=MEMORY | {"sensory": 0}), _tokens(2, 31)
    found = losses_without_memories(model, tokens)
    for row in range(2):
        alone = [_losses(model, tokens[row, start : start + 7]) for start in range(0, 30, 6)]
        torch.testing.assert_close(found[row], torch.cat(alone))
    assert not torch.allclose(found, losses_with_memory(model, tokens))


def test_a_memory_keeps_no_more_of_a_longer_text() -> None:
    """Another model keeps keys and values of all of it."""
    remembering = tiny_network(tiny_config(memory=MEMORY))
    plain = tiny_network(tiny_config())
    short, long = (
        [most_bytes(n, [1] * length) for n in (remembering, plain)] for length in (30, 600)
    )
    assert long[0] < 1.05 * short[0]
    assert long[1] > 1.5 * short[1]


def test_arms_learn_from_as_many_tokens(tmp_path: Path) -> None:
    """At every step; three seeds of each."""
    (tmp_path / "manifest.json").write_text('{"fingerprint": "f"}')
    grid = load_grid(STUDIES / "hmt" / "grid.yaml")
    runs = [plan_run(grid, point, tmp_path, {"texts": tmp_path}) for point in grid.settings()]
    assert len(runs) == 12
    tokens = {
        run.config["batch"]["micro_size"] * run.config["data"]["sequence_length"] for run in runs
    }
    assert tokens == {4032}
    assert len({run.config["train"]["steps"] for run in runs}) == 1
