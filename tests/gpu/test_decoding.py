"""Decoding on a GPU: the logits and texts of a CPU, and no forward that waits for the host."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from model.decoding.acceptance import accept_greedy
from model.decoding.batch import Decoder
from model.decoding.chain import ChainDecoder
from model.decoding.choosing import Chooser
from model.decoding.generation import collect, generate, stream
from model.decoding.sampling import Sampling
from model.decoding.tree import TreeDecoder
from model.hugging_face.names import hf_names, split
from model.inference.network import Network
from model.inference.prefill import prefill
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts, tiny_weights


def network_on(device: torch.device, dtype: torch.dtype) -> Network:
    """The tiny model there."""
    config = tiny_config()
    stored = {
        hf_name: part
        for name, weight in tiny_weights(config).items()
        for hf_name, part in zip(hf_names(name, config), split(name, weight, config), strict=True)
    }
    return Network.read(config, stored.__getitem__, dtype, device)


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_a_cpu(device: torch.device, dtype: torch.dtype) -> None:
    """Prompts of different lengths, in fp32 up to rounding and in bf16 as near as it allows."""
    lengths = torch.tensor([40, 13, 8])
    rows = torch.randint(20, (3, 40), generator=torch.Generator().manual_seed(1))
    exact = tiny_network(tiny_config())
    network = network_on(device, dtype)
    with torch.no_grad():
        expected = prefill(exact, exact.new_cache(3, 40), rows, lengths, 4, 16)
        found = prefill(
            network, network.new_cache(3, 40), rows.to(device), lengths.to(device), 4, 16
        )
    size = float(expected.abs().max())
    error = float((found.cpu().double() - expected).abs().max())
    # TF32 is off unless asked for; bf16 keeps 8 bits and six layers add their errors up.
    assert error < (1e-4 if dtype == torch.float32 else 0.1) * size


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_greedy_texts_are_those_of_a_cpu(device: torch.device, kind: str) -> None:
    """In fp64, where no two logits are as near as rounding."""
    network = network_on(device, torch.float64)
    decoder: Decoder = ChainDecoder(network, heads=3)
    if kind == "tree":
        decoder = TreeDecoder(network, heads=3, spread=2)
    found = collect(stream(decoder, tiny_prompts(), max_new_tokens=24), len(tiny_prompts()))
    expected = generate(tiny_network(tiny_config()), tiny_prompts(), heads=1, max_new_tokens=24)
    assert found.tokens == expected.tokens


def test_sampled_texts_are_those_of_a_cpu(device: torch.device) -> None:
    """A row's random numbers do not depend on the device."""
    texts = [
        generate(
            network,
            tiny_prompts(),
            heads=3,
            max_new_tokens=20,
            sampling=Sampling(temperature=0.8, top_k=12, top_p=0.95, repetition_penalty=1.2),
        ).tokens
        for network in (network_on(device, torch.float64), tiny_network(tiny_config()))
    ]
    assert texts[0] == texts[1]


def test_no_forward_waits_for_the_host(device: torch.device) -> None:
    """Verifying, accepting and drafting only queue work."""
    network = network_on(device, torch.bfloat16)
    cache = network.new_cache(2, 128)
    cache.lengths = torch.tensor([3, 9], device=device)
    pending = torch.zeros(2, 4, dtype=torch.long, device=device)
    network.numbers(128)
    for guarded in (False, True):  # the first time sets kernels and libraries up
        with torch.no_grad(), waits_are_errors(torch.device("cpu") if not guarded else device):
            block = network.following(cache, 4, 64)
            trunk_output = network.trunk(pending, cache, block)
            network.fill_heads(trunk_output, 4, cache, block)
            logits = network.logits(network.heads(trunk_output, 1, 1, cache, block)[0])
            best = logits.argmax(-1).unflatten(0, (2, 4))
            kept = accept_greedy(best, pending[:, 1:]).kept
            at = trunk_output[network.numbers(2) * 4 + kept]
            drafts = network.logits(network.heads(at, 2, 4, cache, block.at(kept)))
    assert drafts.shape == (3, 2, 20)


def test_no_draw_waits_for_the_host(device: torch.device) -> None:
    """Sampled rows, whose random numbers come from the host, many at a time."""
    sampling = Sampling(temperature=0.8, top_k=12, top_p=0.95, repetition_penalty=1.2)
    chooser = Chooser([sampling] * 2, [1, 2], 20, device)
    drafts = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(1)).to(device)
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(2)).to(device)
    for guarded in (False, True):
        with torch.no_grad(), waits_are_errors(torch.device("cpu") if not guarded else device):
            verdict = chooser.verify(logits, chooser.draft(drafts))
    assert verdict.kept.shape == verdict.following.shape == (2,)
