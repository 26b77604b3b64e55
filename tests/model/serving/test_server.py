"""The server with the real `openai` client: texts are those of offline decoding."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from model.decoding.batch import Batch, Piece
from model.decoding.generation import generate
from model.decoding.sampling import Sampling
from model.inference.loading import LoadedNetwork, load_network
from pipeline.exporting.writing import write_record
from tests.support.serving import TEMPLATE, RunningServer, read_all, running
from tests.support.tiny_export import VOCABULARY, describe, export_tiny
from tests.support.tiny_model import tiny_config

PROMPTS = ["def f(x):", "é", "import os\n", "a", "x" * 20]
TOKENS = 24


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with a chat template."""
    folder = tmp_path_factory.mktemp("serving") / "export"
    export_tiny(folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"chat_template": TEMPLATE}
    settings.write_text(json.dumps(content))
    (folder / "headway.json").unlink()
    write_record(folder, describe(tiny_config(vocab_size=VOCABULARY)))
    return folder


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[RunningServer]:
    """A server that every test of this file uses."""
    with running(export, "--max-batch", "8", "--queue", "4") as found:
        yield found


@pytest.fixture(scope="module")
def loaded(export: Path) -> LoadedNetwork:
    """The same export offline."""
    return load_network(export)


def offline(
    loaded: LoadedNetwork, prompt: str, tokens: int, sampling: Sampling, seed: int = 0
) -> tuple[str, str]:
    """Text and reason to end of one row alone."""
    ids = loaded.tokenizer.encode(prompt, add_special_tokens=False).ids
    [found] = generate(
        loaded.network,
        [ids],
        heads=4,
        max_new_tokens=tokens,
        eos_id=loaded.eos_ids,
        sampling=sampling,
        seeds=[seed],
    ).tokens
    begin = loaded.tokenizer.decode(ids)
    whole = loaded.tokenizer.decode(ids + [t for t in found if t not in loaded.eos_ids])
    return whole.removeprefix(begin), "stop" if found[-1] in loaded.eos_ids else "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.8)])
def test_completions_are_those_of_offline_decoding(
    server: RunningServer, loaded: LoadedNetwork, sampling: Sampling, stream: bool
) -> None:
    """Greedy and with seeds, several prompts at once and n of each, whole and in pieces."""
    found = ["" for _ in range(2 * len(PROMPTS[:4]))]
    reasons = list(found)
    answer = server.client.completions.create(
        model="tiny",
        prompt=PROMPTS[:4],
        n=2,
        max_tokens=TOKENS,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=5,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    for part in answer if stream else [answer]:
        usage = part.usage
        for choice in part.choices:
            found[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or ""
    expected = [
        offline(loaded, prompt, TOKENS, sampling, 5 + 2 * place + copy)
        for place, prompt in enumerate(PROMPTS[:4])
        for copy in range(2)
    ]
    assert list(zip(found, reasons, strict=True)) == expected
    assert usage is not None
    assert usage.prompt_tokens == sum(len(prompt.encode()) for prompt in PROMPTS[:4])
    assert 0 < usage.completion_tokens <= 8 * TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_chats_use_the_template_of_the_export(
    server: RunningServer, loaded: LoadedNetwork, stream: bool
) -> None:
    """The prompt is what it makes of the messages; the answer fills the room unless told."""
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi é"}]
    prompt = "<system>be<user>hi é<assistant>"
    answer = server.client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, stream=stream
    )
    text = ""
    if stream:
        for part in answer:
            text += part.choices[0].delta.content or ""
            reason = part.choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    room = 64 - len(prompt.encode())
    assert (text, reason) == offline(loaded, prompt, room, Sampling())


def test_logprobs_and_stop_strings(server: RunningServer, loaded: LoadedNetwork) -> None:
    """As OpenAI's API has them: of each token shown, with the likeliest ones."""
    whole, _ = offline(loaded, "ab", TOKENS, Sampling())
    stop = next(whole[i : i + 2] for i in range(3, 20) if whole[i : i + 2].isascii())
    for stream in (False, True):
        answer = server.client.completions.create(
            model="tiny",
            prompt="ab",
            max_tokens=TOKENS,
            temperature=0,
            logprobs=3,
            stop=[stop],
            stream=stream,
        )
        parts = [part.choices[0] for part in (answer if stream else [answer])]
        assert "".join(part.text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].finish_reason == "stop"
        tops = [top for part in parts for top in part.logprobs.top_logprobs]
        own = [value for part in parts for value in part.logprobs.token_logprobs]
        assert len(own) == len(tops) > 3
        assert all(value == max(top.values()) for value, top in zip(own, tops, strict=True))
        assert max(map(len, tops)) == 3  # fewer where pieces of characters are spelled alike
    chat = server.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [e.top_logprobs[0].logprob for e in content]
    assert len(content) == 4


def test_the_model_is_listed(server: RunningServer) -> None:
    """Under its name alone."""
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="ask for tiny"):
        server.client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="ask for tiny"):
        server.client.completions.create(model="gpt", prompt="a")


BAD: list[tuple[dict[str, object], str]] = [
    ({"temperature": -1}, "temperature: -1"),
    ({"temperature": 1e-5}, "temperature: 1e-05 must be 0 or at least 0.001"),
    ({"temperature": "hot"}, "temperature: Input should be a valid number"),
    ({"max_tokens": 0}, "max_tokens: 0 must be from 1 to 64"),
    ({"max_tokens": 64}, "max_tokens: 2 tokens of the prompt and 64 new ones are more than the 64"),
    ({"prompt": "x" * 64}, "prompt: has 64 tokens, and a text may have 64 here"),
    ({"prompt": [[1, 260]]}, "prompt: has a token that is not from 0 to 259"),
    ({"prompt": []}, "prompt: has 0 prompts; give 1 to 8"),
    ({"prompt": ["a"] * 9}, "prompt: has 9 prompts; give 1 to 8"),
    ({"prompt": "\ud800"}, "prompt: has halves of characters"),
    ({"n": 9}, "n: 9 must be from 1 to 8"),
    ({"top_p": 0}, "top_p: 0"),
    ({"stop": ["a"] * 17}, "stop: takes up to 16 strings"),
    ({"stop": [""]}, "stop: takes up to 16 strings"),
    ({"echo": True}, "echo: is not supported here; leave it out, or give false"),
    ({"logit_bias": {"5": 1}}, "logit_bias: is not supported here"),
    ({"best_of": 3}, "best_of: is not supported here"),
    ({"use_beam_search": True}, "use_beam_search: is not supported here"),
    ({"num_beams": 4}, "num_beams: is not supported here"),
    ({"logprobs": 99}, "logprobs: 99 must be from 0 to 20"),
    ({"seed": 1 << 70}, "seed: 1180591620717411303424 must be from"),
    ({"nonsense": 1}, "nonsense: Extra inputs are not permitted"),
    ({"stream_options": {}}, "stream_options: is for streams alone"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda value: str(value)[:30])
def test_what_cannot_be_meant_is_an_error_object(
    server: RunningServer, fields: dict[str, object], words: str
) -> None:
    """It names the field, the value and the rule; OpenAI's client understands it."""
    body = {"model": "tiny", "prompt": "ab"} | fields
    status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert answer["error"]["message"].startswith(words)
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == words.partition(":")[0]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "the body is not JSON in UTF-8"),
        (b"\xff", 400, "the body is not JSON in UTF-8"),
        (b"[1]", 400, "the body is not a JSON object"),
        (b"[" * 100_000, 400, "the body is nested too deep"),
        (b'{"temperature": NaN}', 400, "the body is not JSON in UTF-8"),
        (b'{"prompt": "a"}', 400, "model: Field required"),
        (b" " * (9 << 20), 413, "the body has more than 8,388,608 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_bodies_are_error_objects(
    server: RunningServer, body: bytes, status: int, words: str
) -> None:
    """Whatever bytes come."""
    found, _, answer = server.post("/v1/completions", body)
    assert found == status
    assert answer["error"]["message"].startswith(words)


def test_other_mistakes_are_error_objects(server: RunningServer) -> None:
    """Paths, methods, templates that refuse."""
    assert server.post("/v1/nothing", b"")[0] == 404
    status, _, answer = server.post("/health", b"")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="no villains"):
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "villain", "content": "x"}]
        )
    with pytest.raises(openai.BadRequestError, match="tools: is not supported here"):
        server.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_a_key_is_asked_for(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an option or the environment; health and metrics are open."""
    monkeypatch.setenv("HEADWAY_API_KEY", "secret")
    with running(export) as server:
        assert server.client.models.list().data[0].id == "tiny"
        for key in ("secre", "secret2", "é"):
            given = f"Authorization: Bearer {key}"
            status, headers, answer = server.post("/v1/completions", b"{}", given)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert server.post("/v1/completions", b"{}")[0] == 401
        assert server.metric("running") == 0


def test_a_client_that_is_gone_makes_room(server: RunningServer) -> None:
    """Streams, whole answers, and texts that still wait leave when their clients do."""
    before = server.metric("cancelled_total")
    body = {"model": "tiny", "prompt": ["a"] * 8, "max_tokens": 60, "temperature": 1}
    for stream in (True, False):
        content = json.dumps(body | {"stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        server.raw(head % len(content) + content).close()
        wait_for(lambda: server.metric("running") + server.metric("waiting") == 0)
    assert server.metric("cancelled_total") > before


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_refuses_with_a_time(export: Path) -> None:
    """Requests past what runs and may wait get 429 and Retry-After; the others their texts."""
    with running(export, "--max-batch", "1", "--queue", "1", "--max-model-len", "1000") as server:
        fields = {"model": "tiny", "prompt": "a", "max_tokens": 900, "temperature": 0}
        body = json.dumps(fields).encode()
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: server.post("/v1/completions", body), range(6)))
        refused = [answer for answer in found if answer[0] == 429]
        texts = {answer[2]["choices"][0]["text"] for answer in found if answer[0] == 200}
        assert len(refused) >= 3
        assert len(texts) == 1
        for _, headers, answer in refused:
            assert 1 <= int(headers["retry-after"]) <= 60
            assert answer["error"]["code"] == "queue_full"
        assert server.metric("refused_total") == len(refused)


def test_a_step_that_fails_ends_its_texts_and_no_others(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole answers and streams are told; the log has the reason; the next text is as ever."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 8, "temperature": 0}
    text = server.client.completions.create(**body).choices[0].text
    step, failures = Batch.step, server.metric("failures_total")

    def fails(batch: Batch) -> list[Piece]:
        monkeypatch.setattr(Batch, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Batch, "step", fails)
    with pytest.raises(openai.InternalServerError, match="decoding failed: out of memory"):
        server.client.completions.create(**body)
    monkeypatch.setattr(Batch, "step", fails)
    with pytest.raises(openai.APIError, match="decoding failed: out of memory"):
        list(server.client.completions.create(**body, stream=True))
    assert server.metric("failures_total") == failures + 2
    assert "decoding failed; 1 texts are given up" in caplog.text
    assert server.client.completions.create(**body).choices[0].text == text


@pytest.mark.parametrize("clients", [12, pytest.param(64, marks=pytest.mark.stress)])
def test_many_clients_of_all_kinds(export: Path, loaded: LoadedNetwork, clients: int) -> None:
    """Good ones get their own texts, whatever others do; at the end nothing runs or waits."""
    expected = {prompt: offline(loaded, prompt, 40, Sampling())[0] for prompt in PROMPTS}
    wrong: list[str] = []

    with running(export, "--max-batch", "8", "--queue", "64") as server:

        def client(number: int) -> None:
            for turn in range(3):
                kind, prompt = (number + turn) % 6, PROMPTS[(number + turn) % len(PROMPTS)]
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0}
                content = json.dumps(body | {"stream": kind != 0}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
                if kind in (0, 1):
                    answer = server.client.completions.create(**body, stream=kind == 1)
                    parts = answer if kind == 1 else [answer]
                    text = "".join(part.choices[0].text for part in parts)
                    if text != expected[prompt]:
                        wrong.append(f"{prompt!r}: {text!r}")
                elif kind == 2:
                    server.raw(f"{head}\r\n\r\n".encode() + content).close()
                elif kind == 3:
                    assert server.post("/v1/completions", b"{" * (number + 1))[0] == 400
                elif kind == 4:
                    assert server.post("/v1/completions", b"x" * (9 << 20))[0] == 413
                else:
                    request = f"{head}\r\nConnection: close\r\n\r\n".encode() + content
                    with server.raw(request) as slow:
                        time.sleep(0.3)  # reads nothing meanwhile
                        assert read_all(slow).rstrip().endswith(b"0")

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        assert wrong == []
        wait_for(lambda: server.metric("running") + server.metric("waiting") == 0)
        assert server.metric("failures_total") == 0
        assert server.metric("generated_tokens_total") >= server.metric("forwards_total") > 0
        assert server.metric("first_token_seconds_count") > 0
