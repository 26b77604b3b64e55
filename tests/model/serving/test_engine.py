"""The queue before the batch, without a server around it."""

import asyncio
import contextlib
import threading

from model.decoding.batch import Batch, Request
from model.decoding.chain import ChainDecoder
from model.decoding.generation import generate
from model.serving.engine import Engine, Row
from model.serving.metrics import Metrics
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts

TOKENS = 6


async def _text(row: Row) -> list[int]:
    return [token async for piece in row for token in piece.tokens]


def test_a_text_that_still_waits_leaves_the_queue_with_its_client() -> None:
    """It is never begun and counts as cancelled; those before and behind it get their texts."""
    network, go_on, metrics = tiny_network(tiny_config()), threading.Event(), Metrics()

    def hold(rows: int) -> None:
        go_on.wait()

    batch = Batch(ChainDecoder(network, heads=2), 1, 64, on_step=hold)
    engine = Engine(lambda: batch, 4, metrics)
    prompts = tiny_prompts()[:3]

    async def clients() -> list[list[int]]:
        engine.start()
        with contextlib.ExitStack() as gone, contextlib.ExitStack() as others:
            [first] = others.enter_context(engine.rows([Request(prompts[0], TOKENS)]))
            begun = await first.next()  # it is in the batch, which stands still before its step
            [leaving] = gone.enter_context(engine.rows([Request(prompts[1], TOKENS)]))
            [last] = others.enter_context(engine.rows([Request(prompts[2], TOKENS)]))
            assert engine.waiting == 2
            gone.close()
            assert engine.waiting == 1
            go_on.set()
            texts = [begun.tokens + await _text(first), await _text(last)]
            assert leaving.pieces.empty()
        engine.stop()
        return texts

    found = asyncio.run(clients())
    expected = generate(network, prompts, heads=1, max_new_tokens=TOKENS).tokens
    assert found == [expected[0], expected[2]]
    said = metrics.text()
    assert "headway_cancelled_total 1\n" in said
    assert "headway_finished_total 2\n" in said
    assert f"headway_prompt_tokens_total {len(prompts[0]) + len(prompts[2])}\n" in said
