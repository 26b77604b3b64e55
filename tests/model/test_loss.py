"""Chunked vocabulary-parallel cross-entropy: value, both gradients, memory, extremes."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.loss import (
    IGNORED,
    VocabularyShard,
    linear_cross_entropy,
    loss_and_gradients,
    loss_and_predictions,
    product_adds_in_float32,
)
from tests.support.harness import run_ranks

TOKENS, HIDDEN, VOCABULARY = 13, 6, 12
WHOLE = VocabularyShard(0, VOCABULARY, None)
CHUNKS = (1, 4, TOKENS, 100)  # 4 leaves a last chunk of one token


class Problem(NamedTuple):
    """Inputs of the loss."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor


class Solution(NamedTuple):
    """Loss sum and both gradients."""

    loss: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor


def make_problem(
    tokens: int = TOKENS,
    hidden: int = HIDDEN,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Random inputs with two ignored labels, and the first and last id among the labels."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[:4] = torch.tensor([0, IGNORED, vocabulary - 1, IGNORED])
    return Problem(
        torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype),
        labels,
    )


def solve(problem: Problem, chunk_tokens: int, scale: Tensor | float = 1.0) -> Solution:
    """Our loss, by the call that training uses."""
    hidden, weight, labels = problem
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight_gradient = torch.zeros_like(weight, dtype=dtype)
    shard = VocabularyShard(0, weight.shape[0], None)
    result = loss_and_gradients(
        hidden,
        weight,
        labels,
        shard=shard,
        scale=scale,
        weight_gradient=weight_gradient,
        chunk_tokens=chunk_tokens,
    )
    return Solution(result.loss_sum, result.hidden_gradient, weight_gradient)


def reference(problem: Problem) -> Solution:
    """Cross-entropy of torch over whole logits, in float64."""
    hidden = problem.hidden.double().requires_grad_()
    weight = problem.weight.double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.t(), problem.labels, reduction="sum")
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Solution(loss.detach(), hidden.grad, weight.grad)


def assert_relative(actual: Solution, expected: Solution, tolerance: float) -> None:
    """Each part differs by at most `tolerance` of its norm."""
    for name, found, wanted in zip(Solution._fields, actual, expected, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_gradients_pass_gradcheck(chunk_tokens: int) -> None:
    """Numerical differentiation in float64 gives both gradients, with ignored labels."""
    hidden, weight, labels = make_problem()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, shard=WHOLE, chunk_tokens=chunk_tokens)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_equals_cross_entropy_over_whole_logits(chunk_tokens: int) -> None:
    """1e-12 in float64; in float32 1e-6, a few roundings of 2^-24 each."""
    problem = make_problem()
    assert_relative(solve(problem, chunk_tokens), reference(problem), 1e-12)
    single = make_problem(dtype=torch.float32)
    assert_relative(solve(single, chunk_tokens), reference(single), 1e-6)


def test_scale_is_on_the_gradients_alone() -> None:
    """The head's weight over the count of targets multiplies gradients; the sum stays unscaled."""
    problem = make_problem()
    plain = solve(problem, 4)
    scaled = solve(problem, 4, scale=torch.tensor(0.25))
    torch.testing.assert_close(scaled.loss, plain.loss, rtol=0, atol=0)
    torch.testing.assert_close(scaled.hidden_gradient, plain.hidden_gradient / 4)
    torch.testing.assert_close(scaled.weight_gradient, plain.weight_gradient / 4)


def test_weight_gradient_is_added_to() -> None:
    """What the buffer holds, from earlier heads, stays in it."""
    hidden, weight, labels = make_problem()
    buffer = torch.ones_like(weight)
    loss_and_gradients(
        hidden, weight, labels, shard=WHOLE, scale=1.0, weight_gradient=buffer, chunk_tokens=4
    )
    torch.testing.assert_close(buffer - 1, solve(make_problem(), 4).weight_gradient)


def _on_two_ranks(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and megatron's on this rank's half of the vocabulary: loss, gradients of both inputs."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weight, labels = make_problem(dtype=dtype)
    labels = labels.clamp(min=0)  # megatron's knows no ignored labels
    shard = VocabularyShard.of_rank(VOCABULARY // 2, group)
    ours = [hidden.clone().requires_grad_(), weight.chunk(2)[shard.start > 0].requires_grad_()]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    loss = linear_cross_entropy(ours[0], ours[1], labels, shard=shard, chunk_tokens=4)
    loss.backward()
    logits = theirs[0] @ theirs[1].t()
    expected = vocab_parallel_cross_entropy(logits.unsqueeze(1), labels.unsqueeze(1)).sum()
    expected.backward()
    torch.distributed.all_reduce(theirs[0].grad, group=group)  # each rank has its shard's part
    return (
        [loss.detach(), *(tensor.grad for tensor in ours if tensor.grad is not None)],
        [expected.detach(), *(tensor.grad for tensor in theirs if tensor.grad is not None)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_ranks_equal_megatron(dtype: torch.dtype) -> None:
    """Loss and gradients of megatron's vocabulary-parallel loss.

    1e-6 for float64 too: megatron's softmax always runs in float32.
    """
    for ours, theirs in run_ranks(2, _on_two_ranks, dtype):
        assert len(ours) == len(theirs) == 3
        for found, wanted in zip(ours, theirs, strict=True):
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def _solve_on_shard(problem: Problem) -> Solution:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    hidden, weight, labels = problem
    group = parallel_state.get_tensor_model_parallel_group()
    shard = VocabularyShard.of_rank(VOCABULARY // 2, group)
    part = weight.chunk(2)[shard.start > 0]
    gradient = torch.zeros_like(part)
    result = loss_and_gradients(
        hidden, part, labels, shard=shard, scale=1.0, weight_gradient=gradient, chunk_tokens=4
    )
    return Solution(result.loss_sum, result.hidden_gradient, gradient)


def test_two_ranks_equal_one_process() -> None:
    """Ignored labels included, the halves together give the whole, to 1e-12 in float64."""
    expected = reference(make_problem())
    ranks = run_ranks(2, _solve_on_shard, make_problem())
    whole = torch.cat([rank.weight_gradient for rank in ranks])
    for rank in ranks:
        assert_relative(rank._replace(weight_gradient=whole), expected, 1e-12)


def _tied_problem() -> Problem:
    """Equal rows 2, 8 and 10 of the unembedding win for the first token; row 7 for the second."""
    weight = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float64)
    weight[[2, 8, 10], 0] = 1.0
    weight[7, 1] = 1.0
    hidden = torch.eye(HIDDEN, dtype=torch.float64)[:2]
    return Problem(hidden, weight, torch.tensor([8, IGNORED]))


def _predict_on_shard(problem: Problem) -> tuple[Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    shard = VocabularyShard.of_rank(VOCABULARY // 2, group)
    part = problem.weight.chunk(2)[shard.start > 0]
    return loss_and_predictions(problem.hidden, part, problem.labels, shard=shard, chunk_tokens=3)


def test_predictions_are_the_argmax() -> None:
    """Predictions of one process and of two ranks are those of whole logits, and so is the loss."""
    problem = make_problem()
    expected = (problem.hidden @ problem.weight.t()).argmax(dim=-1)
    alone = loss_and_predictions(*problem, shard=WHOLE, chunk_tokens=3)
    for loss, predictions in [alone, *run_ranks(2, _predict_on_shard, problem)]:
        assert torch.equal(predictions, expected)
        torch.testing.assert_close(loss, reference(problem).loss, rtol=1e-12, atol=0)


def test_a_tie_goes_to_the_lowest_id() -> None:
    """Also where the equal logits lie on different ranks: tokens may not depend on the layout."""
    problem = _tied_problem()
    alone = loss_and_predictions(*problem, shard=WHOLE, chunk_tokens=3)
    for _, predictions in [alone, *run_ranks(2, _predict_on_shard, problem)]:
        assert predictions.tolist() == [2, 7]


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_for_one_chunk_only(dtype: torch.dtype) -> None:
    """No tensor is larger than [chunk, V]; torch's loss, measured alike, has [T, V]."""
    tokens, vocabulary, chunk_tokens = 64, 500, 16
    problem = make_problem(tokens, 8, vocabulary, dtype)
    with _LargestTensor() as naive:
        reference(problem)
    assert naive.elements == tokens * vocabulary
    with _LargestTensor() as training:
        solve(problem, chunk_tokens)
    shard = VocabularyShard(0, vocabulary, None)
    with _LargestTensor() as differentiable:
        hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
        linear_cross_entropy(
            hidden, weight, problem.labels, shard=shard, chunk_tokens=chunk_tokens
        ).backward()
    with _LargestTensor() as validation:
        loss_and_predictions(*problem, shard=shard, chunk_tokens=chunk_tokens)
    for ours in (training, differentiable, validation):
        assert ours.elements == chunk_tokens * vocabulary


def test_all_labels_ignored_gives_zero() -> None:
    """A head without a single target has loss 0 and zero gradients, not NaN."""
    problem = make_problem()._replace(labels=torch.full((TOKENS,), IGNORED))
    for part in solve(problem, 4):
        assert torch.equal(part, torch.zeros_like(part))
    loss, _ = loss_and_predictions(*problem, shard=WHOLE, chunk_tokens=4)
    assert float(loss) == 0.0


def test_ignored_positions_get_no_gradient() -> None:
    """Exactly zero at ignored positions, and not zero at the others."""
    problem = make_problem()
    rows = solve(problem, 4).hidden_gradient.abs().sum(dim=1)
    assert torch.equal(rows == 0, problem.labels == IGNORED)


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1e4, whose exponentials overflow even float64, in float32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = make_problem(dtype=dtype)
        logits = hidden @ weight.t()
        problem = Problem((hidden * (1e4 / logits.abs().max())), weight, labels)
        assert float((problem.hidden @ weight.t()).abs().max()) > 0.9e4
        solution = solve(problem, 4)
        assert all(bool(part.isfinite().all()) for part in solution)
        assert float(solution.loss) > 1e3


def test_extreme_logits_of_one_rank_stay_finite() -> None:
    """Logits of 1e4 on one rank and -1e4 on the other: all ranks subtract the same maximum."""
    hidden = torch.full((2, 1), 100.0)
    weight = torch.full((VOCABULARY, 1), 100.0)
    weight[: VOCABULARY // 2] = -100.0
    problem = Problem(hidden, weight, torch.tensor([0, VOCABULARY - 1]))
    for solution in run_ranks(2, _solve_on_shard, problem):
        assert all(bool(part.isfinite().all()) for part in solution)
        assert float(solution.loss) == pytest.approx(2e4, rel=1e-3)


@pytest.mark.parametrize("chunk_tokens", [1, 64, 256])
def test_bf16_follows_float64(chunk_tokens: int) -> None:
    """One bf16 rounding is 2^-9 of a number; logits and gradients go through two of them.

    The reference has the same bf16 inputs. Logits of size 4 are wrong by 2^-7 at most, so the mean
    loss of random signs by far less, and each gradient by about 2^-7 of its norm.
    """
    problem = make_problem(256, 64, 200, torch.bfloat16)
    problem = problem._replace(hidden=problem.hidden / 8)
    solution, expected = solve(problem, chunk_tokens), reference(problem)
    assert solution.loss.dtype == torch.float32
    assert abs(float(solution.loss / expected.loss) - 1) < 1e-3
    assert_relative(solution._replace(loss=expected.loss), expected, 2**-7)


def test_bf16_gradient_of_a_confident_token_keeps_its_digits() -> None:
    """The target's p - 1 is taken before rounding: at p = 0.999 bf16 would make it 0."""
    weight = torch.eye(8, dtype=torch.bfloat16)
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16)
    hidden[0, 3] = 9.0
    problem = Problem(hidden, weight, torch.tensor([3]))
    found, wanted = solve(problem, 1).hidden_gradient[0, 3], reference(problem).hidden_gradient
    assert abs(float(found) / float(wanted[0, 3]) - 1) < 2**-8


def test_bf16_weight_gradient_accumulates_in_float32() -> None:
    """A head's small gradient survives beside a sum of 1, where bf16 would drop it.

    The sum's float32 roundings are 2^-24 each.
    """
    problem = make_problem(dtype=torch.bfloat16)
    hidden, weight, labels = problem
    alone = solve(problem, TOKENS, scale=1e-4).weight_gradient
    assert 0 < float(alone.abs().max()) < 2**-9
    buffer = torch.ones_like(weight, dtype=torch.float32)
    loss_and_gradients(
        hidden, weight, labels, shard=WHOLE, scale=1e-4, weight_gradient=buffer, chunk_tokens=TOKENS
    )
    torch.testing.assert_close(buffer - 1, alone, rtol=0, atol=2**-23)


def test_sums_apart_where_no_product_adds_in_float32() -> None:
    """On a CPU torch has no such product, which is found out by trying."""
    assert not product_adds_in_float32(torch.device("cpu"))


def test_the_product_that_adds_has_the_shapes_of_a_sum() -> None:
    """Torch accepts the call that runs on GPUs: transposed factor, float32 sum that is the result.

    On the meta device, where operations check their arguments and compute nothing.
    """
    total = torch.empty(6, 4, device="meta")
    left = torch.empty(5, 6, dtype=torch.bfloat16, device="meta").t()
    right = torch.empty(5, 4, dtype=torch.bfloat16, device="meta")
    found = torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    assert found is total
