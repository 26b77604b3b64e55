"""The form of the model that decodes computes what training's form and transformers compute."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.decoding.acceptance import accept_greedy
from model.hugging_face.modeling_headway import HeadwayForCausalLM
from model.inference.loading import load_network
from model.inference.network import Network
from model.inference.prefill import prefill
from tests.support.head_variants import VARIANTS
from tests.support.tiny_export import export_tiny
from tests.support.tiny_model import head_logits, tiny_config, tiny_model, tiny_network

LENGTHS = torch.tensor([24, 13, 8])
NEW = 5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def tokens(vocab_size: int = 20) -> Tensor:
    """Three rows of tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocab_size, (3, 40), generator=generator)


@torch.no_grad()
def decoded(network: Network, rows: Tensor, piece: int) -> tuple[Tensor, Tensor]:
    """Prompts of three lengths, then a block of five tokens after each of them.

    Returns:
        `[n, 3, V]` at the prompts' ends and `[n, 3, 5, V]` within the blocks.
    """
    heads = network.num_heads
    cache = network.new_cache(3, 70)
    first = prefill(network, cache, rows[:, : int(LENGTHS.max())], LENGTHS, heads, piece)
    steps = LENGTHS.unsqueeze(1) + torch.arange(NEW)
    block = network.following(cache, NEW, 64)
    trunk_output = network.trunk(rows.gather(1, steps), cache, block)
    network.fill_heads(trunk_output, heads, cache, block)
    later = network.logits(network.heads(trunk_output, 1, heads, cache, block))
    return first, later.unflatten(1, (3, NEW))


def errors(network: Network, expected: Tensor, rows: Tensor, piece: int = 512) -> float:
    """Largest difference of any logit from those `[n, 3, S, V]` of a forward without a cache."""
    first, later = decoded(network, rows, piece)
    largest = 0.0
    for row, length in enumerate(LENGTHS.tolist()):
        for found, at in (
            (first[:, row], expected[:, row, length - 1]),
            (later[:, row], expected[:, row, length : length + NEW]),
        ):
            largest = max(largest, float((found.double() - at.double()).abs().max()))
    return largest


@pytest.mark.parametrize("piece", [512, 7, 1])
@pytest.mark.parametrize(
    "sizes", [{}, {"kv_heads": 1}, {"kv_heads": 4}, {"rope_scaling": LLAMA3}, {"future_tokens": 1}]
)
def test_logits_are_those_of_training(sizes: dict[str, Any], piece: int) -> None:
    """All heads, grouped queries or not, prompts whole or in pieces, and blocks after them."""
    config = tiny_config(**sizes)
    expected = head_logits(tiny_model(config), tokens())
    assert errors(tiny_network(config), expected, tokens(), piece) < 1e-12
    shifted = head_logits(tiny_model(config), tokens().roll(1, dims=1))
    assert errors(tiny_network(config), shifted, tokens(), piece) > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_heads_compute_the_same(variant: str) -> None:
    """The heads that are not used leave no trace in those that are, and need no cache."""
    config = tiny_config(**{"layers": 10, **VARIANTS[variant]})
    network, rows = tiny_network(config), tokens()
    lengths = torch.tensor([40, 40, 40])
    all_heads = prefill(network, network.new_cache(3, 40), rows, lengths, 4)
    sizes = []
    for heads in range(1, 5):
        cache = network.new_cache(3, 40, heads)
        few = prefill(network, cache, rows, lengths, heads)
        torch.testing.assert_close(few, all_heads[:heads])
        sizes.append(sum(buffer.shape[3] for buffer in cache.buffers))
    # An anticausal model's next token passes all heads; linear ones keep nothing.
    each = 0 if config.head_kind in ("anticausal", "linear") else config.head_layers
    assert [size - sizes[0] for size in sizes] == [each * config.kv_heads * k for k in range(4)]
    assert sizes[0] == config.next_token_layers * config.kv_heads


def test_fp32_and_bf16_are_as_near_as_their_rounding_allows() -> None:
    """In fp32 1e-5 from exact; in bf16 no farther than twice what training's form is."""
    config = tiny_config()
    exact = head_logits(tiny_model(config), tokens())
    size = float(exact.abs().max())
    assert errors(tiny_network(config, dtype=torch.float32), exact, tokens()) < 1e-5 * size
    ours = errors(tiny_network(config, dtype=torch.bfloat16), exact, tokens())
    theirs = float(
        (head_logits(tiny_model(config, dtype=torch.bfloat16), tokens()).double() - exact)
        .abs()
        .max()
    )
    assert 1e-5 * size < ours < 2 * theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_of_each_kind(variant: str) -> None:
    """Its matrices may be packed ones: no farther from exact than twice what training's form is."""
    config = tiny_config(**{"layers": 10, **VARIANTS[variant]})
    lengths = torch.tensor([40, 40, 40])

    def last_logits(dtype: torch.dtype) -> Tensor:
        network = tiny_network(config, dtype=dtype)
        return prefill(network, network.new_cache(3, 40), tokens(), lengths, 4).double()

    exact = last_logits(torch.float64)
    rounded = head_logits(tiny_model(config, dtype=torch.bfloat16), tokens())[:, :, -1].double()
    allowed = 2 * (rounded - exact).abs().max()
    assert 0 < (last_logits(torch.bfloat16) - exact).abs().max() < allowed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_gives_the_logits_of_transformers(tmp_path: Path, dtype: str) -> None:
    """Loaded from the same files, head 1 is the plain Llama and all heads the class beside it."""
    export_tiny(tmp_path / "export", dtype=dtype)
    loaded = load_network(tmp_path / "export", torch.float32)
    rows = tokens(loaded.record.description.model.vocab_size)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32
    )
    whole = HeadwayForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    with torch.no_grad():
        head_1 = plain(rows).logits.unsqueeze(0)
        heads = whole.all_head_logits(rows).permute(2, 0, 1, 3)
    size = float(heads.abs().max())
    assert errors(loaded.network, heads, rows) < 1e-5 * size
    torch.testing.assert_close(head_1[0], heads[0])
    assert (
        load_network(tmp_path / "export").network.dtype
        == {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
        }[dtype]
    )


def test_long_prompts_are_read_in_pieces() -> None:
    """No mask or score grows with the square of a prompt's length."""
    network = tiny_network(tiny_config(), dtype=torch.float32)
    length = 3000
    row = torch.randint(20, (1, length), generator=torch.Generator().manual_seed(1))
    largest = 0

    class Watch(TorchDispatchMode):
        """Sees every tensor that an operation of torch makes."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    cache = network.new_cache(1, length)
    with Watch(), torch.no_grad():
        prefill(network, cache, row, torch.tensor([length]), 4)
    assert 0 < largest <= 512 * 2 * length < length**2


def test_a_forward_never_waits_for_the_device() -> None:
    """On tensors without values, a forward with drafts runs; reading a value would fail."""
    config = tiny_config()
    network = tiny_network(config, dtype=torch.float32)
    cache = network.new_cache(2, 128)
    network.numbers(128)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        cache.lengths = mode.from_tensor(torch.tensor([3, 9]))
        block = network.following(cache, 4, 64)
        pending = mode.from_tensor(torch.zeros(2, 4, dtype=torch.long))
        trunk_output = network.trunk(pending, cache, block)
        network.fill_heads(trunk_output, 4, cache, block)
        logits = network.logits(network.heads(trunk_output, 1, 1, cache, block)[0])
        best = logits.argmax(-1).unflatten(0, (2, 4))
        kept = accept_greedy(best, pending[:, 1:]).kept
        at = trunk_output[network.numbers(2) * 4 + kept]
        drafts = network.logits(network.heads(at, 2, 4, cache, block.at(kept)))
        assert drafts.shape == (3, 2, config.vocab_size)
        with pytest.raises(DataDependentOutputException):
            kept.tolist()
