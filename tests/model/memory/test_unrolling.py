"""A model with a memory: segments, prompts, what sees what, and how far gradients go back.

Against the equations in plain torch (`tests.support.plain_memory`) and by what must hold for any
weights. In float64, where two ways to the same number differ by rounding of about 1e-15.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.backward import sequential_backward
from model.language_model import MultiTokenModel
from model.memory.sizes import MemorySizes
from model.memory.unrolling import Window, unroll, windows
from tests.support.plain_memory import PlainMemoryModel
from tests.support.tiny_model import tiny_weights, training_model

SIZES: dict[str, Any] = {
    "segment": 6,
    "summary": 4,
    "sensory": 2,
    "cache": 3,
    "width": 8,
    "bptt": 1,
}
LENGTH, HEADS, VOCABULARY = 27, 3, 20
TOLERANCE = 1e-9


def _model(**changes: Any) -> MultiTokenModel:
    return training_model(memory=SIZES | changes)


def _plain(model: MultiTokenModel) -> PlainMemoryModel:
    weights = {
        name: weight.double().requires_grad_()
        for name, weight in tiny_weights(model.config).items()
    }
    return PlainMemoryModel(model.config, weights)


def _tokens(rows: int = 2, length: int = LENGTH + HEADS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def _logits(
    model: MultiTokenModel, tokens: Tensor, documents: Tensor | None = None, **window: Any
) -> Tensor:
    """`[B, S, n, V]`."""
    trunk_output = model(tokens, documents=documents, **window)
    context = model.heads_context(trunk_output, documents)
    return model.all_logits(trunk_output, context).permute(2, 1, 0, 3)


class _Watched:
    """A reader that keeps what passes through the trunk, in order."""

    def __init__(self, model: MultiTokenModel) -> None:
        self.model = model
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.embed(tokens)

    def transform(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        output = self.model.transform(hidden, documents)
        if output.requires_grad:
            output.retain_grad()
        self.inputs.append(hidden)
        self.outputs.append(output)
        return output

    def unroll(self, tokens: Tensor, memories: list[Tensor], **options: Any) -> Tensor:
        sizes = self.model.config.memory
        assert sizes is not None
        return unroll(self, self.model.memory(), sizes, tokens, memories, **options)


@pytest.mark.parametrize("mode", ["strict_prev", "paper"])
@pytest.mark.parametrize("changes", [{}, {"sensory": 0}, {"retrieval": False}])
def test_logits_are_those_of_the_equations(mode: str, changes: dict[str, Any]) -> None:
    """Every head at every token, the last and shorter segment included; and all memories."""
    model = _model(mode=mode, **changes)
    tokens, memories = _tokens(), list[Tensor]()
    logits = _logits(model, tokens, memories=memories)
    for row in range(2):
        plain = _plain(model).read(tokens[row])
        expected = torch.cat(plain.logits, dim=1).transpose(0, 1)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=TOLERANCE)
        found = torch.stack(memories)[:, row]
        torch.testing.assert_close(found, torch.stack(plain.memories), rtol=0, atol=TOLERANCE)


def test_h1_lengths_of_the_passes_and_the_memories_kept() -> None:
    """Of j + 2 and 1 + k + L + 1 tokens, none sensory in segment 0; the last N memories."""
    watched = _Watched(_model(bptt=9))
    memories: list[Tensor] = []
    tokens = _tokens(length=30)
    watched.unroll(tokens, memories)
    lengths = [len(hidden) for hidden in watched.inputs]
    assert lengths == [1 + 6 + 1] + 4 * [4 + 2, 1 + 2 + 6 + 1]
    # A memory that has left the cache has no part in the prompt; the oldest kept one has.
    for changed, differs in ((0, False), (1, True)):
        other = list(memories)
        other[changed] = other[changed] + 1
        again = _Watched(watched.model)
        again.unroll(tokens, other, window=Window(4, 4, 5))
        prompt = again.inputs[-1][0]
        assert torch.equal(prompt, watched.inputs[-1][0]) is not differs


def test_h5_nothing_else_goes_from_segment_to_segment() -> None:
    """Without sensory tokens and memories a segment is read as if it stood alone."""
    model = _model(sensory=0)
    tokens = _tokens()
    for number in range(5):
        within = slice(6 * number, min(6 * number + 6, 30))
        alone = _logits(model, tokens[:, within])
        found = _logits(model, tokens, window=Window(number, number, number + 1), memories=[])
        torch.testing.assert_close(found, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("retrieval", [True, False])
def test_h6_no_prediction_sees_a_later_token(retrieval: bool) -> None:
    """In mode strict_prev, over the whole stream and for every token."""
    model = _model(retrieval=retrieval)
    tokens = _tokens(rows=1)
    logits = _logits(model, tokens)
    for changed in range(tokens.shape[1]):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        difference = (_logits(model, other) - logits).abs().amax((0, 2, 3))
        assert difference[:changed].max() < TOLERANCE if changed else True
        assert difference[changed] > TOLERANCE


def test_h6_as_published_the_first_half_of_a_segment_sees_itself() -> None:
    """In mode paper a token changes what is before it only in its segment, and only below j."""
    model = _model(mode="paper")
    tokens = _tokens(rows=1)
    logits = _logits(model, tokens)
    leaks = set()
    for changed in range(tokens.shape[1]):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        difference = (_logits(model, other) - logits).abs().amax((0, 2, 3))
        earlier = set((difference[:changed] > TOLERANCE).nonzero().flatten().tolist())
        start = changed // 6 * 6
        leaks |= earlier
        in_summary = changed - start < 4
        assert earlier <= (set(range(start, changed)) if in_summary and start else set())
    # The prompt of segment 1 is the only memory there is, whatever the summary.
    assert leaks == {start + place for start in (12, 18, 24) for place in range(3)}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_h7_gradients_go_back_so_many_segments(depth: int) -> None:
    """The loss of segment m moves the memories of m - D .. m - 1, and no older one."""
    model = _model(bptt=depth)
    sizes = model.config.memory
    assert sizes is not None
    tokens, memories = _tokens(), list[Tensor]()
    seen = {}
    for window in windows(sizes, tokens.shape[1]):
        for number in range(window.scored, window.stop):
            watched = _Watched(model)
            output = watched.unroll(tokens, list(memories), window=window)
            part = output.split(sizes.segment)[number - window.scored]
            part.square().sum().backward()
            # of the reading passes, which end each segment's turn
            reads = [out for out in watched.outputs if len(out) != sizes.summary + 2]
            moved = [
                window.first + index
                for index, read in enumerate(reads)
                if read.grad is not None and bool(read.grad[-1].any())
            ]
            seen[number] = [m for m in moved if m < number]
        watched.unroll(tokens, memories, window=window)
    assert seen == {m: list(range(max(0, m - depth), m)) for m in range(5)}
    assert not any(memory.requires_grad for memory in memories)


@pytest.mark.parametrize("mode", ["strict_prev", "paper"])
def test_h7_all_gradients_are_the_truncated_ones(mode: str) -> None:
    """Windows give each parameter the sum over segments of what each loss gives, cut off at D.

    The reference runs the whole stream again for each segment's loss, with older memories as
    values. Targets are of the stream: those of a segment's last positions lie in the next one.
    """
    model = _model(mode=mode)
    sizes, stream = model.config.memory, _tokens()
    assert sizes is not None
    tokens = stream[:, :LENGTH]
    labels = torch.stack([stream[:, k : k + LENGTH] for k in range(1, HEADS + 1)])
    memories: list[Tensor] = []
    scales, sums = torch.tensor([1.0, 0.5, 2.0]).double(), torch.zeros(HEADS).double()
    for window in windows(sizes, LENGTH):
        output = model(tokens, window=window, memories=memories)
        scored = slice(window.scored * sizes.segment, window.stop * sizes.segment)
        result = sequential_backward(model, output, labels[:, :, scored], scales, chunk_tokens=8)
        sums += result.loss_sums
        result.surrogate_loss.backward()

    plain = _plain(model)
    expected = torch.zeros(HEADS).double()
    for row in range(2):
        for number in range(sizes.num_segments(LENGTH)):
            reading = plain.read(tokens[row], depth=sizes.bptt, of=number)
            start = number * sizes.segment
            wanted = labels[:, row, start : start + sizes.segment]
            logits = reading.logits[number]
            losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(
                HEADS, -1
            )
            expected += losses.detach().sum(1)
            (losses.sum(1) * scales).sum().backward()
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)  # loss sums are float32
    for name, parameter in model.named_parameters():
        wanted_gradient = plain.weights[name].grad
        assert parameter.grad is not None, name
        assert wanted_gradient is not None, name
        difference = (parameter.grad - wanted_gradient).norm() / wanted_gradient.norm()
        assert difference < 1e-6, name


def test_h8_stage_1_hands_the_last_memory_on() -> None:
    """Without retrieval the prompt is the memory of the segment before, and nothing is asked."""
    watched = _Watched(_model(retrieval=False))
    memories: list[Tensor] = []
    watched.unroll(_tokens(), memories)
    assert len(watched.inputs) == 5
    initial = watched.model.get_parameter("memory.initial")
    assert torch.equal(watched.inputs[0][0], initial.expand(2, -1))
    for number in range(1, 5):
        for place in (0, -1):
            assert torch.equal(watched.inputs[number][place], memories[number - 1])


@pytest.mark.parametrize("retrieval", [True, False])
def test_h11_padding_does_not_reach_a_row(retrieval: bool) -> None:
    """Rows of any length give in a batch what each gives alone."""
    model = _model(retrieval=retrieval)
    tokens = _tokens(rows=3)
    lengths = (30, 17, 4)
    documents = torch.stack([(torch.arange(30) >= length).int() for length in lengths])
    together = _logits(model, tokens, documents=documents)
    for row, length in enumerate(lengths):
        alone = _logits(model, tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(together[row, :length], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("retrieval", [True, False])
def test_documents_share_nothing(retrieval: bool) -> None:
    """Neither tokens, nor prompts, nor memories of one document reach another, both ways.

    One of them begins at the border of a segment, and then is read as if the stream began there.
    """
    model = _model(retrieval=retrieval)
    tokens = _tokens(rows=1)
    starts = [0, 8, 18, 23]
    documents = torch.zeros(1, 30, dtype=torch.int32)
    documents[0, starts[1:]] = 1
    documents = documents.cumsum(1)
    logits = _logits(model, tokens, documents=documents)
    for number, start in enumerate(starts):
        other = torch.where(documents == number, (tokens + 1) % VOCABULARY, tokens)
        difference = (_logits(model, other, documents=documents) - logits).abs().amax((2, 3))
        assert difference[documents != number].max() < TOLERANCE
        assert difference[documents == number].min() > TOLERANCE, start
    alone = _logits(model, tokens[:, 18:], documents=documents[:, 18:])
    torch.testing.assert_close(logits[:, 18:], alone, rtol=0, atol=TOLERANCE)


def test_windows_score_every_segment_once() -> None:
    """Each in the window that goes D segments back, or to the beginning."""
    for depth in range(4):
        for length in range(1, 40):
            sizes = MemorySizes(segment=6, bptt=depth)
            found = windows(sizes, length)
            scored = [m for window in found for m in range(window.scored, window.stop)]
            assert scored == list(range(-(-length // 6)))
            for window in found:
                assert window.stop - window.first <= depth + 1
                for m in range(window.scored, window.stop):
                    assert window.first == max(0, m - depth)
