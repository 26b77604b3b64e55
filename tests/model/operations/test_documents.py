"""Documents in one sequence: each is computed as if it were alone."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.saved_tensors import SavedTensorMeter
from model.backward import joint_loss, sequential_backward
from model.language_model import MultiTokenModel
from model.layers import Checkpointing, LayerContext
from model.loss import IGNORED
from model.operations.attention import attend
from model.operations.documents import (
    BLOCK,
    bias_within,
    blocks_within,
    positions_within,
    visible_within,
)
from model.structure.sharding import placement_of, take_slice
from tests.support.flex_on_cpu import blocks_on_cpu
from tests.support.harness import run_ranks
from tests.support.tiny_model import (
    head_logits,
    tiny_config,
    tiny_model,
    tiny_weights,
    training_model,
)

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])
LENGTHS = ((4, 1, 5), (2, 8))  # of the documents of each sequence
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
TOLERANCE = 1e-12  # float64; sums of masked and of shorter sequences run in another order


def parts() -> list[tuple[int, slice]]:
    """Batch index and positions of every document."""
    found = []
    for index, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            found.append((index, slice(start, start + length)))
            start += length
    return found


def masked_labels(heads: int) -> Tensor:
    """Labels `[n, B, S]` that stay within their document, as the loader makes them."""
    labels = torch.full((heads, *TOKENS.shape), IGNORED)
    for index, span in parts():
        for head in range(1, heads + 1):
            last = span.stop - head
            if last > span.start:
                labels[head - 1, index, span.start : last] = TOKENS[
                    index, span.start + head : span.stop
                ]
    return labels


def documents_alone(labels: Tensor) -> list[tuple[Tensor, Tensor, None]]:
    """Tokens and labels of each document as a sequence of its own."""
    return [
        (TOKENS[index : index + 1, span], labels[:, index : index + 1, span], None)
        for index, span in parts()
    ]


def test_positions_and_mask_of_a_sequence() -> None:
    """Positions start again with each document; a query sees its own document up to itself."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)
    assert positions_within(documents).tolist() == [[0, 1, 2, 0, 1, 0]]
    assert visible_within(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 4])
def test_document_in_a_row_is_the_document_alone(kv_heads: int, heads: int) -> None:
    """Logits of every head, with grouped and with full keys."""
    model = tiny_model(tiny_config(kv_heads=kv_heads, future_tokens=heads))
    packed = head_logits(model, TOKENS, DOCUMENTS)
    for index, span in parts():
        alone = head_logits(model, TOKENS[index : index + 1, span])
        torch.testing.assert_close(packed[:, index, span], alone[:, 0], rtol=0, atol=TOLERANCE)


def test_one_document_is_a_plain_row() -> None:
    """With one document a sequence, the mask and its positions change nothing."""
    model = tiny_model(tiny_config())
    plain = head_logits(model, TOKENS)
    one = head_logits(model, TOKENS, torch.zeros_like(TOKENS, dtype=torch.int32))
    torch.testing.assert_close(one, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("span", range(10))
def test_another_token_changes_its_own_document_alone(span: int) -> None:
    """Exactly nothing changes in its other documents, nor before the token, for any head."""
    model = tiny_model(tiny_config())
    changed = TOKENS.clone()
    changed[0, span] = 19
    difference = head_logits(model, changed, DOCUMENTS) - head_logits(model, TOKENS, DOCUMENTS)
    reached = (DOCUMENTS[0] == DOCUMENTS[0, span]) & (torch.arange(10) >= span)
    assert bool((difference[:, 0, ~reached] == 0).all())
    assert bool((difference[:, 0, reached].abs().amax(-1) > 1e-6).all())
    assert bool((difference[:, 1] == 0).all())


def test_positions_alone_do_not_keep_documents_apart() -> None:
    """With positions that start again but the plain mask, an earlier document changes later ones.

    Resetting positions is sometimes taken for document masking; this is what it lacks.
    """
    model = tiny_model(tiny_config())

    def outputs(tokens: Tensor) -> Tensor:
        context = model.context(10, tokens.device, DOCUMENTS)._replace(mask=None)
        trunk_output = model.trunk(tokens, context)
        return torch.stack([model.heads.hidden(k, trunk_output, context) for k in (1, 4)])

    changed = TOKENS.clone()
    changed[0, 0] = 19
    difference = (outputs(changed) - outputs(TOKENS))[:, :, 0].abs().amax(-1)
    assert bool((difference[:, 4:] > 1e-3).all())


def gradients(
    model: MultiTokenModel,
    sequences: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    sequential: bool,
) -> dict[str, Tensor]:
    """Every parameter's gradient after micro-batches of tokens, labels and documents."""
    backward = sequential_backward if sequential else joint_loss
    model.zero_grad()
    scales = torch.linspace(0.5, 2.0, len(model.heads.numbers), dtype=torch.float64)
    for tokens, labels, documents in sequences:
        trunk_output = model(tokens, documents=documents)
        backward(
            model, trunk_output, labels, scales, chunk_tokens=7, documents=documents
        ).surrogate_loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_gradients_of_a_row_are_those_of_its_documents(
    checkpointing: Checkpointing, sequential: bool, heads: int
) -> None:
    """Of every parameter, against one micro-batch for each document, whatever is recomputed."""
    labels = masked_labels(heads)
    model = training_model(checkpointing, heads=heads)
    packed = gradients(model, [(TOKENS, labels, DOCUMENTS)], sequential)
    expected = gradients(training_model(heads=heads), documents_alone(labels), sequential=False)
    assert packed.keys() == expected.keys()
    assert len(packed) == len(list(model.parameters()))
    for name, wanted in expected.items():
        assert float(wanted.abs().max()) > 1e-6, name
        torch.testing.assert_close(packed[name], wanted, rtol=0, atol=TOLERANCE)


def test_layers_keep_one_mask_between_them() -> None:
    """What each further attention keeps for backward is no more than without a mask."""

    def saved_bytes(layers: int, mask: Tensor | None) -> int:
        start = torch.randn(64, 1, 4, 8, requires_grad=True)
        with SavedTensorMeter() as meter:
            hidden = start
            for _ in range(layers):
                hidden = attend(hidden, hidden, hidden, mask).view_as(start)
            hidden.sum().backward()
        return meter.peak

    bias = bias_within(torch.arange(64).unsqueeze(0) // 10, torch.float32)
    growth = [saved_bytes(3, mask) - saved_bytes(1, mask) for mask in (None, bias)]
    assert growth[0] == growth[1] > 0
    assert saved_bytes(1, bias) - saved_bytes(1, None) == bias.nbytes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4 * BLOCK), st.data())
def test_blocks_are_those_of_every_pair_of_positions(length: int, data: st.DataObject) -> None:
    """The lists made from the blocks' borders equal torch's, which asks about all S x S pairs."""
    starts = data.draw(st.lists(st.lists(st.integers(1, length)), min_size=1, max_size=2))
    documents = torch.zeros(len(starts), length + 1, dtype=torch.int32)
    for index, starts_here in enumerate(starts):
        documents[index, starts_here] = 1
    documents = documents.cumsum(1, dtype=torch.int32)[:, :length]
    every_pair = visible_within(documents)
    found = blocks_within(documents)
    expected = create_block_mask(
        lambda index, _, query, key: every_pair[index, 0, query, key],
        len(starts),
        None,
        length,
        length,
        device="cpu",
    )
    assert found.seq_lengths == expected.seq_lengths
    for kind in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            name = f"{kind}_{part}"
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@torch.no_grad()
def test_blocks_give_the_outputs_of_the_bias(kv_heads: int, checkpointing: Checkpointing) -> None:
    """Flex attention, here without its kernel, in every layer of trunk and heads."""
    model = training_model(checkpointing, kv_heads=kv_heads)
    bias = model.context(10, TOKENS.device, DOCUMENTS)
    assert isinstance(bias.mask, Tensor)
    blocks = bias._replace(mask=blocks_within(DOCUMENTS))

    def outputs(context: LayerContext) -> Tensor:
        trunk_output = model.trunk(TOKENS, context)
        return torch.stack([model.heads.hidden(k, trunk_output, context) for k in (1, 2, 3)])

    torch.testing.assert_close(outputs(blocks), outputs(bias), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("sequential", [True, False])
def test_blocks_give_the_gradients_of_the_bias(
    checkpointing: Checkpointing, sequential: bool
) -> None:
    """Through flex attention as it is traced for a GPU, whatever is recomputed."""
    sequences = [(TOKENS, masked_labels(3), DOCUMENTS)]
    expected = gradients(training_model(), sequences, sequential)
    with blocks_on_cpu():
        model = training_model(checkpointing)
        assert isinstance(model.context(10, TOKENS.device, DOCUMENTS).mask, BlockMask)
        found = gradients(model, sequences, sequential)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=TOLERANCE)


def _on_two_ranks(kv_heads: int) -> tuple[Tensor, Tensor, float]:
    """With the model split over two tensor-parallel ranks.

    Returns:
        Difference of this rank's logits between documents in a sequence and alone, that between two
        sequences that differ in document 0, `[n, S, V']`, and the largest difference of a gradient.
    """
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = tiny_config(kv_heads=kv_heads, future_tokens=3)
    model = MultiTokenModel(config, dtype=torch.float64)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, weight in tiny_weights(config).items():
            part = take_slice(weight, placement_of(name), rank, 2)
            model.get_parameter(name).copy_(part)
    packed = head_logits(model, TOKENS, DOCUMENTS)
    alone = packed.clone()
    for index, span in parts():
        alone[:, index, span] = head_logits(model, TOKENS[index : index + 1, span])[:, 0]
    changed = TOKENS.clone()
    changed[0, 0] = 19
    other = head_logits(model, changed, DOCUMENTS)
    labels = masked_labels(3)
    found = gradients(model, [(TOKENS, labels, DOCUMENTS)], sequential=True)
    found = {name: gradient.clone() for name, gradient in found.items()}
    expected = gradients(model, documents_alone(labels), sequential=False)
    worst = max(float((found[name] - wanted).abs().max()) for name, wanted in expected.items())
    return packed - alone, (packed - other)[:, 0], worst


@pytest.mark.parametrize("kv_heads", [pytest.param(2, marks=pytest.mark.stress), 4])
def test_documents_stay_apart_under_tensor_parallelism(kv_heads: int) -> None:
    """Logits and gradients are those of the documents alone, and no document reaches another."""
    for difference, reached, gradient in run_ranks(2, _on_two_ranks, kv_heads):
        assert float(difference.abs().max()) < TOLERANCE
        assert float(gradient) < TOLERANCE
        assert bool((reached[:, 4:] == 0).all())
        assert bool((reached[:, :4].abs().amax(-1) > 1e-6).all())
