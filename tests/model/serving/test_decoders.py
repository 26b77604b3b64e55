"""Decoders that requests ask for: texts are those of the command, and the others do not wait."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from model.beams.command import beam_decoder
from model.decoding.sampling import Sampling
from model.inference.loading import LoadedNetwork, load_network
from tests.model.serving.test_server import offline, wait_for
from tests.support.serving import RunningServer, running
from tests.support.written_texts import output, printed_ids

LONG = 900
MADE_BY = "model.serving.decoders.beam_decoder"
DRAWN = {"temperature": 1.2, "top_k": 30}


@pytest.fixture(scope="module")
def server(export: Path) -> Iterator[RunningServer]:
    """A server that most tests of this file use."""
    arguments = ["--max-batch", "2", "--max-beams", "6", "--max-model-len", "1000"]
    with running(export, *arguments) as found:
        yield found


@pytest.fixture(scope="module")
def loaded(export: Path) -> LoadedNetwork:
    """The same export offline."""
    return load_network(export)


def asked(server: RunningServer, **fields: Any) -> Any:
    """An answer."""
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 20} | fields
    status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 200, answer
    return answer


@pytest.mark.parametrize(
    ("fields", "lossy"),
    [
        ({"decoder": "beam", "temperature": 0}, False),
        ({"decoder": "beam", "temperature": 0, "beam_width": 1, "length_penalty": 0.0}, False),
        ({"decoder": "beam", "beam_width": 3, "distinct_beams": True, **DRAWN}, False),
        ({"decoder": "dsbd", "beam_width": 3, "min_width": 3, **DRAWN}, False),
        ({"decoder": "dsbd", "width_threshold": 0.5, "one_beam": True, **DRAWN}, True),
        ({"decoder": "mtad", "temperature": 0, "tau": 0.1}, True),
        ({"decoder": "mtad", "beam_width": 3, "candidates": 2, "min_p": 0.01, **DRAWN}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_texts_are_those_of_the_command(
    server: RunningServer,
    export: Path,
    loaded: LoadedNetwork,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, object],
    lossy: bool,
) -> None:
    """With its seed, for two texts of a request; the answer says what they are."""
    answer = asked(server, seed=5, n=2, logprobs=0, **fields)
    check_texts(answer, export, loaded, capsys, command_options(fields))
    assert (answer["decoder"], answer["lossy"]) == (fields["decoder"], lossy)


def command_options(fields: dict[str, Any]) -> list[str]:
    """The command's options that mean the same as a request's fields."""
    options = []
    for name, value in fields.items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value is True else [option, str(value)]
    return options


def check_texts(
    answer: Any,
    export: Path,
    loaded: LoadedNetwork,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    """See that two texts of the seed 5 are those of the command, and have logprobs."""
    for choice, seed in zip(answer["choices"], ("5", "6"), strict=True):
        out = output(
            capsys,
            *[str(export), "--prompt", "ab", "--max-new-tokens", "20", "--ids", "--seed", seed],
            *options,
        )
        [ids] = printed_ids(out)
        shown = [token for token in ids if token not in loaded.eos_ids]
        assert choice["text"] == loaded.tokenizer.decode(shown, skip_special_tokens=True)
        assert choice["finish_reason"] == ("length" if ids == shown else "stop")
        assert len(choice["logprobs"]["token_logprobs"]) == len(shown)
        assert all(logprob <= 0 for logprob in choice["logprobs"]["token_logprobs"])


def test_a_stop_string_ends_a_beam(server: RunningServer) -> None:
    """It is not shown, and the reason is that it stopped."""
    fields = {"decoder": "beam", "beam_width": 1, "temperature": 0}
    text = asked(server, **fields)["choices"][0]["text"]
    stop = next(letter for letter in text[2:] if letter.isascii())
    cut = asked(server, stop=stop, **fields)["choices"][0]
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_joint_decoding_is_streamed(server: RunningServer) -> None:
    """Every piece is marked; together they are the whole text."""
    fields = {"decoder": "mtad", "tau": 0.2, "seed": 3}
    whole = asked(server, **fields)["choices"][0]
    stream = server.client.completions.create(
        model="tiny", prompt="ab", max_tokens=20, stream=True, extra_body=fields
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts) == whole["text"]
    assert parts[-1].choices[0].finish_reason == whole["finish_reason"]
    assert all(part.lossy is True and part.decoder == "mtad" for part in parts)
    assert len(parts) > 2


def test_plain_texts_are_not_marked(server: RunningServer, export: Path) -> None:
    """Answers are as they were; on a server that decodes all texts by a lossy rule all say so."""
    assert not {"decoder", "lossy"} & asked(server).keys()
    assert asked(server, beam_width=1, length_penalty=1, decoder=None)
    with running(export, "--decoder", "mtad", "--tau", "0.3") as other:
        answer = asked(other)
        assert (answer["decoder"], answer["lossy"]) == ("mtad", True)
        answer = asked(other, decoder="beam", temperature=0)
        assert (answer["decoder"], answer["lossy"]) == ("beam", False)


def test_others_are_served_meanwhile(server: RunningServer, loaded: LoadedNetwork) -> None:
    """While a long text of six beams runs, short ones begin and end; they are their own."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": LONG, "temperature": 0}
    content = json.dumps(body | {"decoder": "beam", "beam_width": 6}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    before = server.metric("cancelled_total")
    with server.raw(head % len(content) + content):
        wait_for(lambda: server.metric("running_beams") == 6)
        for _ in range(3):
            text = asked(server, temperature=0)["choices"][0]["text"]
            assert text == offline(loaded, "ab", 20, Sampling())[0]
        assert server.metric("running_beams") == 6
        forwards = server.metric("decoder_forwards_total")
        assert server.metric("running") == 1
        wait_for(lambda: server.metric("decoder_forwards_total") > forwards)
    # Its client is gone now.
    wait_for(lambda: server.metric("running_beams") == 0)
    assert server.metric("cancelled_total") == before + 1
    assert server.metric("running") + server.metric("waiting") == 0


def test_beams_wait_for_room_and_others_do_not(server: RunningServer) -> None:
    """A second text of too many beams waits in its own queue; its client may go."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": LONG, "temperature": 0}
    content = json.dumps(body | {"decoder": "beam", "beam_width": 4}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with server.raw(head % len(content) + content):
        wait_for(lambda: server.metric("running_beams") == 4)
        with server.raw(head % len(content) + content):
            wait_for(lambda: server.metric("waiting") == 1)
            assert server.metric("running_beams") == 4
            asked(server)
            assert server.metric("waiting") == 1
        wait_for(lambda: server.metric("waiting") == 0)
        # Two beams fit beside the four.
        asked(server, decoder="beam", beam_width=2)
    wait_for(lambda: server.metric("running_beams") == 0)


def test_a_queue_that_is_full_refuses_beams(export: Path) -> None:
    """Those that run at once do not count; the others do, and get 429."""
    arguments = ["--queue", "0", "--max-beams", "4", "--max-model-len", "1000"]
    body = {"model": "tiny", "prompt": "x", "max_tokens": LONG, "temperature": 0}
    content = json.dumps(body | {"decoder": "beam", "beam_width": 4}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with running(export, *arguments) as server:
        asked(server, decoder="beam", beam_width=2, n=2)
        with server.raw(head % len(content) + content):
            wait_for(lambda: server.metric("running_beams") == 4)
            status, headers, answer = server.post("/v1/completions", content)
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
            # That of others is another one.
            assert asked(server)["choices"][0]["text"]


def test_a_failure_ends_its_text_alone(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next text is as ever, and the batch's texts never knew."""
    text = asked(server, decoder="beam", temperature=0)["choices"][0]["text"]
    failures = server.metric("failures_total")

    def fails(*arguments: object, **named: object) -> None:
        monkeypatch.setattr(MADE_BY, beam_decoder)
        raise RuntimeError("out of memory")

    body = {"model": "tiny", "prompt": "ab", "max_tokens": 100, "temperature": 0}
    stream = server.client.completions.create(**body, stream=True)
    next(stream)
    monkeypatch.setattr(MADE_BY, fails)
    with pytest.raises(openai.InternalServerError, match="decoding failed: out of memory"):
        server.client.completions.create(**body, extra_body={"decoder": "beam"})
    assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
    assert server.metric("failures_total") == failures + 1
    assert "a text of its own decoder is given up" in caplog.text
    assert server.metric("running_beams") == 0
    assert asked(server, decoder="beam", temperature=0)["choices"][0]["text"] == text


@pytest.mark.parametrize("decoder", ["beam", "dsbd", "mtad"])
def test_odd_requests_have_their_texts(server: RunningServer, decoder: str) -> None:
    """No prompt, the longest one that there is room for, one token, more texts than beams."""
    for fields, tokens in (
        ({"prompt": "", "max_tokens": 3}, 3),
        ({"prompt": "x" * 999, "max_tokens": 1}, 1),
        ({"max_tokens": 1, "beam_width": 1}, 1),
        ({"max_tokens": 2, "beam_width": 6, "n": 2}, 4),
    ):
        answer = asked(server, decoder=decoder, seed=1, **fields)
        assert answer["usage"]["completion_tokens"] == tokens
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert server.metric("running_beams") == 0


BEAM = {"decoder": "beam"}
BAD: list[tuple[dict[str, object], str]] = [
    ({"decoder": "tree"}, "decoder: tree is none; give beam, dsbd or mtad, or leave it out"),
    ({"decoder": 3}, "decoder: Input should be a valid string"),
    ({"beam_width": 4}, "beam_width: is of the decoder beam or dsbd or mtad, and none is asked"),
    ({"tau": 0.5}, "tau: is of the decoder mtad, and none is asked for; leave tau out"),
    ({**BEAM, "tau": 0.5}, "tau: is of the decoder mtad, which beam does not have; leave tau"),
    ({"decoder": "mtad", "one_beam": False}, "one_beam: is of the decoder dsbd, which mtad does"),
    ({**BEAM, "beam_width": 7}, "beam_width: 7 must be from 1 to 6"),
    ({**BEAM, "beam_width": 0}, "beam_width: 0 must be from 1 to 6"),
    ({**BEAM, "length_penalty": 11}, "length_penalty: 11 must be from -10 to 10"),
    ({"decoder": "dsbd", "width_threshold": 2}, "width_threshold: 2 must be from 0 to 1"),
    ({"decoder": "dsbd", "min_width": 5}, "min_width: 5 must be from 1 to 4, the beam_width"),
    ({"decoder": "mtad", "candidates": 5}, "candidates: 5 must be from 1 to 4, the beam_width"),
    ({"decoder": "mtad", "tau": -1}, "tau: -1 must be from 0 to 1"),
    ({"decoder": "dsbd", "temperature": 0}, "temperature: 0 leaves the decoder dsbd nothing to"),
    ({**BEAM, "temperature": 0, "distinct_beams": True}, "distinct_beams: is of beams that are"),
    ({**BEAM, "repetition_penalty": 1.1}, "repetition_penalty: 1.1 does not go with the decoder"),
    ({**BEAM, "stream": True}, "stream: a text of the decoder beam is known when all its beams"),
    ({"decoder": "dsbd", "stream": True}, "stream: a text of the decoder dsbd is known when all"),
    ({**BEAM, "logprobs": 1}, "logprobs: of the decoder beam there are no likeliest other tokens"),
    ({**BEAM, "max_tokens": 0}, "max_tokens: 0 must be from 1 to 1000"),
    ({**BEAM, "max_tokens": 1000}, "max_tokens: 2 tokens of the prompt and 1000 new ones are more"),
    ({**BEAM, "prompt": "x" * 1000}, "prompt: has 1000 tokens, and a text may have 1000 here"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=lambda value: str(value)[:50])
def test_what_cannot_be_meant_is_refused(
    server: RunningServer, fields: dict[str, object], words: str
) -> None:
    """In one line that names the field, its value, the rule and the way out."""
    body = {"model": "tiny", "prompt": "ab"} | fields
    status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert answer["error"]["message"].startswith(words)
    assert answer["error"]["param"] == words.partition(":")[0]


@pytest.mark.parametrize(
    ("arguments", "decoder", "words"),
    [
        (["--heads", "1"], "dsbd", "decoder: dsbd needs somebody who drafts, and one head alone"),
        (["--heads", "1"], "mtad", "decoder: mtad needs somebody who drafts, and one head alone"),
        (["--max-beams", "0"], "beam", "decoder: this server has no decoders by request"),
    ],
)
def test_servers_without_drafts_or_beams_say_so(
    export: Path, arguments: list[str], decoder: str, words: str
) -> None:
    """Their other texts are as ever."""
    with running(export, *arguments) as server:
        body = {"model": "tiny", "prompt": "ab", "decoder": decoder}
        status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
        assert status == 400
        assert answer["error"]["message"].startswith(words)
        assert asked(server)["choices"][0]["text"]
