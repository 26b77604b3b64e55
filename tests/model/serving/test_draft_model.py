"""A second model that drafts for a server: texts are the command's, and all its limits hold."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.command_line import EXIT_USER_ERROR
from model.config import ModelConfig
from model.inference.cache import Cache
from model.inference.loading import LoadedNetwork, load_network
from model.inference.network import Network
from model.serve import check, load, main, parse, used_heads
from model.structure.parameter_shapes import parameter_shapes
from pipeline.exporting.writing import write_export
from tests.model.serving.test_decoders import asked, check_texts, command_options
from tests.model.serving.test_server import wait_for
from tests.support.serving import RunningServer, running
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, describe, export_tiny
from tests.support.tiny_llama import save_llama
from tests.support.tiny_model import tiny_config, tiny_weights

DRAFTS = 3
POSITIONS = 300
DRAWN = {"temperature": 1.2, "top_p": 0.9}


def write_draft(directory: Path, weights: dict[str, torch.Tensor], config: ModelConfig) -> Path:
    """An export that may draft."""
    tokenizer = byte_tokenizer()
    write_export(
        directory, describe(config), weights.items(), tokenizer=tokenizer, max_file_bytes=10**9
    )
    return directory


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one head that often, but not always, says what head 1 of the tiny export does."""
    config = tiny_config(vocab_size=VOCABULARY, layers=3, future_tokens=1)
    like = tiny_weights(tiny_config(vocab_size=VOCABULARY))
    noise = tiny_weights(config, seed=3)
    weights = {name: like[name] + 0.15 * noise[name] for name in parameter_shapes(config)}
    return write_draft(tmp_path_factory.mktemp("draft") / "draft", weights, config)


@pytest.fixture(scope="module")
def ending_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the end of text, whatever it has read."""
    config = tiny_config(vocab_size=VOCABULARY, layers=3, future_tokens=1)
    weights = {name: torch.zeros_like(w) for name, w in tiny_weights(config).items()}
    weights["trunk.embedding.weight"] += 1
    weights["heads.readout.norm_weight"] += 1
    weights["heads.readout.weight"][256] = 1
    return write_draft(tmp_path_factory.mktemp("ending") / "draft", weights, config)


def drafted_by(folder: Path) -> list[str]:
    """The options of a draft model, of both commands."""
    return ["--draft", str(folder), "--drafts", str(DRAFTS)]


@pytest.fixture(scope="module")
def server(export: Path, draft: Path) -> Iterator[RunningServer]:
    """A server that most tests of this file use."""
    limits = ["--max-batch", "8", "--max-beams", "12", "--max-model-len", str(POSITIONS)]
    with running(export, *drafted_by(draft), *limits) as found:
        yield found


@pytest.fixture(scope="module")
def loaded(export: Path) -> LoadedNetwork:
    """The served model offline."""
    return load_network(export)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        pytest.param({"temperature": 1.1, "top_k": 40}, marks=pytest.mark.stress),
        {"min_p": 0.02, "repetition_penalty": 1.3, **DRAWN},
        {"decoder": "mtad", "temperature": 0, "tau": 0.1},
        {"decoder": "mtad", "beam_width": 5, "candidates": 2, "min_p": 0.01, **DRAWN},
        {"decoder": "dsbd", "temperature": 1, "width_threshold": 0.5},
        {"decoder": "dsbd", "beam_width": 3, "min_width": 3, "distinct_beams": True, **DRAWN},
        pytest.param(
            {"decoder": "dsbd", "one_beam": True, "min_p": 0.01, **DRAWN}, marks=pytest.mark.stress
        ),
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_texts_are_those_of_the_command(
    server: RunningServer,
    export: Path,
    draft: Path,
    loaded: LoadedNetwork,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, object],
) -> None:
    """With the same draft model and seed, of plain texts too; the second model has drafted."""
    before = server.metric("draft_forwards_total")
    answer = asked(server, seed=5, n=2, logprobs=0, **fields)
    assert server.metric("draft_forwards_total") >= before + 2 * (1 + DRAFTS)
    check_texts(answer, export, loaded, capsys, [*drafted_by(draft), *command_options(fields)])


def test_the_end_of_text_may_be_the_first_draft(
    export: Path,
    ending_draft: Path,
    loaded: LoadedNetwork,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kept where the rule keeps all, else passed over."""
    with running(export, *drafted_by(ending_draft)) as server:
        for fields, tokens in (
            ({"decoder": "mtad", "tau": 0, "temperature": 0}, 2),
            ({"decoder": "mtad", "tau": 1, "temperature": 0}, 20),
            ({"decoder": "dsbd", **DRAWN}, 20),
            ({"temperature": 0}, 20),
        ):
            answer = asked(server, seed=5, n=2, logprobs=0, **fields)
            options = [*drafted_by(ending_draft), *command_options(fields)]
            check_texts(answer, export, loaded, capsys, options)
            assert answer["usage"]["completion_tokens"] == 2 * tokens


MIXED: list[dict[str, Any]] = [
    {"seed": 1, "decoder": "mtad", "tau": 0.2, **DRAWN},
    {"seed": 2, "temperature": 0},
    {"seed": 3, "decoder": "dsbd", "beam_width": 3, **DRAWN},
    {"seed": 4, "temperature": 0.8, "min_p": 0.01},
    {"seed": 5, "decoder": "mtad", "temperature": 0, "candidates": 2, "tau": 0},
    {"seed": 6, "decoder": "beam", "temperature": 0},
    {"seed": 7, "decoder": "dsbd", "one_beam": True, **DRAWN},
    {"seed": 8, "repetition_penalty": 1.2, **DRAWN},
]


def test_eight_at_once_have_the_texts_they_have_alone(server: RunningServer) -> None:
    """Of all decoders and seeds; nothing is left behind."""

    def text(number: int) -> Any:
        return asked(server, prompt="cd"[: 1 + number % 2], max_tokens=16, **MIXED[number])[
            "choices"
        ]

    alone = [text(number) for number in range(8)]
    assert len({choices[0]["text"] for choices in alone}) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, reversed(range(8)))) == alone[::-1]
    assert server.metric("running") + server.metric("running_beams") == 0
    assert server.metric("failures_total") == 0


@pytest.mark.parametrize(
    "fields", [{"decoder": "mtad", "tau": 0.2}, {"temperature": 0}], ids=["mtad", "plain"]
)
def test_a_stream_is_the_whole_text(server: RunningServer, fields: dict[str, Any]) -> None:
    """With the likeliest tokens of each place, as in one piece."""
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 20, "logprobs": 2, "seed": 3}
    whole = asked(server, **body | fields)["choices"][0]
    parts = list(server.client.completions.create(**body, stream=True, extra_body=fields))
    assert "".join(part.choices[0].text for part in parts) == whole["text"]
    assert parts[-1].choices[0].finish_reason == whole["finish_reason"]
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    for name in ("token_logprobs", "top_logprobs"):
        assert [one for logprobs in found for one in getattr(logprobs, name)] == (
            whole["logprobs"][name]
        )
    assert any(len(others) == 2 for others in whole["logprobs"]["top_logprobs"])


def test_logprobs_of_a_greedy_text_are_the_models_own(server: RunningServer, export: Path) -> None:
    """Whoever drafts: those of the same server without a draft model."""
    drafted = asked(server, temperature=0, logprobs=3)["choices"][0]
    with running(export) as other:
        own = asked(other, temperature=0, logprobs=3)["choices"][0]
        assert other.metric("draft_forwards_total") == 0
    assert drafted["text"] == own["text"]
    first, second = (choice["logprobs"] for choice in (drafted, own))
    assert first["token_logprobs"] == pytest.approx(second["token_logprobs"], abs=1e-4)
    for mine, theirs in zip(first["top_logprobs"], second["top_logprobs"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("decoder", ["dsbd", "mtad", None])
def test_odd_requests_have_their_texts(server: RunningServer, decoder: str | None) -> None:
    """No prompt, the longest that there is room for, one token, more texts than room."""
    fields: dict[str, Any]
    for fields, tokens in (
        ({"prompt": "", "max_tokens": 3}, 3),
        ({"prompt": "x" * (POSITIONS - 1), "max_tokens": 1}, 1),
        ({"prompt": "x" * (POSITIONS - 9), "max_tokens": 9}, 9),
        ({"max_tokens": 1}, 1),
        ({"max_tokens": 2, "n": 8}, 16),
    ):
        answer = asked(server, decoder=decoder, seed=1, **fields)
        assert answer["usage"]["completion_tokens"] == tokens
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert server.metric("running_beams") == 0


@pytest.mark.parametrize(
    ("fields", "beams"),
    [
        ({"decoder": "dsbd", "beam_width": 12}, 12),
        ({"decoder": "mtad", "beam_width": 12, "stream": True}, 12),
        ({"temperature": 0, "stream": True}, 0),
    ],
    ids=["dsbd", "mtad", "plain"],
)
def test_a_client_that_goes_away_frees_its_place(
    server: RunningServer, fields: dict[str, Any], beams: int
) -> None:
    """Within a text; the next one finds all beams and has the text that it has alone."""
    short = {"decoder": "dsbd", "beam_width": 12, "seed": 9}
    alone = asked(server, **short)["choices"]
    # Eight texts, since one may end before anybody has looked.
    body = {"model": "tiny", "prompt": "x", "max_tokens": POSITIONS - 1, "n": 8} | fields
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    cancelled, forwards = server.metric("cancelled_total"), server.metric("forwards_total")
    with server.raw(head % len(content) + content):
        wait_for(lambda: server.metric("forwards_total") > forwards)
        wait_for(lambda: server.metric("running_beams") == beams)
    used = ("running", "running_beams", "waiting")
    wait_for(lambda: sum(map(server.metric, used)) == 0)
    assert server.metric("cancelled_total") > cancelled
    assert asked(server, **short)["choices"] == alone


def test_a_model_of_one_head_drafts_by_another(
    tmp_path: Path, draft: Path, loaded: LoadedNetwork, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a draft model both decoders are refused, with the reason; with one they are there."""
    single = tmp_path / "single"
    export_tiny(single, layers=3, future_tokens=1)
    with running(single) as server:
        for decoder in ("dsbd", "mtad"):
            body = {"model": "tiny", "prompt": "ab", "decoder": decoder}
            status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
            assert status == 400
            assert answer["error"]["message"] == (
                f"decoder: {decoder} needs somebody who drafts, and one head alone does not; use "
                "more heads or a draft model, or another decoder"
            )
    with running(single, *drafted_by(draft)) as server:
        for decoder in ("dsbd", "mtad"):
            answer = asked(server, decoder=decoder, seed=5, n=2, logprobs=0, temperature=1)
            options = ["--decoder", decoder, "--temperature", "1", *drafted_by(draft)]
            check_texts(answer, single, loaded, capsys, options)
            assert answer["decoder"] == decoder


def test_a_server_of_joint_decoding_has_its_drafts(
    export: Path, draft: Path, loaded: LoadedNetwork, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --decoder mtad all texts come so; the line at the start says who drafts."""
    arguments = [*drafted_by(draft), "--decoder", "mtad", "--tau", "0.2"]
    options = parse([str(export), *arguments], "serve")
    check(options)
    assert load(options, used_heads(options))[1] == "draft model, 3 drafts, joint decoding, lossy"
    with running(export, *arguments) as server:
        answer = asked(server, seed=5, n=2, logprobs=0, **DRAWN)
    check_texts(answer, export, loaded, capsys, [*arguments, *command_options(DRAWN)])
    assert (answer["decoder"], answer["lossy"]) == ("mtad", True)


def test_forwards_of_both_models_are_counted(export: Path, draft: Path) -> None:
    """Of a plain text the drafter reads its prompt, and makes 3 after that and each forward."""
    with running(export, *drafted_by(draft)) as server:
        asked(server, temperature=0)
        forwards = server.metric("forwards_total")
        assert server.metric("draft_forwards_total") == 1 + DRAFTS * (1 + forwards)
        for decoder in ("dsbd", "mtad"):
            before = server.metric("forwards_total"), server.metric("draft_forwards_total")
            asked(server, decoder=decoder, seed=1)
            forwards = server.metric("forwards_total") - before[0]
            drafted = server.metric("draft_forwards_total") - before[1]
            # Near its end a text of beams drafts fewer layers.
            assert 1 + DRAFTS * (forwards - 1) < drafted <= 1 + DRAFTS * forwards


def test_no_text_takes_more_than_was_seen_at_the_start(
    export: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either model, in rows and in tokens of a row, for the longest texts of all beams."""
    taken: list[tuple[int, int, int]] = []
    new_cache = Network.new_cache

    def noted(self: Network, rows: int, capacity: int, heads: int | None = None) -> Cache:
        cache = new_cache(self, rows, capacity, heads)
        # The draft model is the one with one head.
        taken.append((self.num_heads, rows, cache.capacity))
        return cache

    monkeypatch.setattr(Network, "new_cache", noted)
    arguments = ["--draft", str(draft), "--drafts", "20", "--max-beams", "5", "--max-batch", "1"]
    with running(export, *arguments) as server:
        seen = {heads: (rows, capacity) for heads, rows, capacity in taken[-2:]}
        assert seen.keys() == {1, 4}
        begun = len(taken)
        for fields in (
            {"decoder": "dsbd", "beam_width": 5},
            {"decoder": "mtad", "beam_width": 5, "candidates": 5},
        ):
            asked(server, prompt="x" * 50, max_tokens=14, **fields)
    assert len(taken) == begun + 4
    for heads, rows, capacity in taken[begun:]:
        assert rows <= seen[heads][0] == 5
        assert capacity <= seen[heads][1]


def llama_draft(directory: Path, **changes: Any) -> Path:
    """A plain Llama as transformers saves it, with the tokenizer of the tiny export."""
    save_llama(directory, num_hidden_layers=2, **changes)
    (directory / "tokenizer.json").write_bytes(byte_tokenizer())
    return directory


def test_a_plain_llama_drafts_as_far_as_it_was_trained(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of fewer positions than texts may have it is refused, with the way out, which is one."""
    folder = llama_draft(tmp_path / "llama", max_position_embeddings=48)
    capsys.readouterr()
    assert main([str(export), "--port", "0", *drafted_by(folder)]) == EXIT_USER_ERROR
    assert capsys.readouterr().err == (
        f"error: --draft-model {folder} was trained on 48 positions, and texts may have 64 here; "
        "give --max-model-len 48, or a draft model of more\n"
    )
    with running(export, *drafted_by(folder), "--max-model-len", "48") as server:
        greedy = asked(server, temperature=0)["choices"][0]["text"]
        answer = asked(server, prompt="x" * 47, decoder="mtad", max_tokens=1)
        assert answer["usage"]["completion_tokens"] == 1
    with running(export) as server:
        assert asked(server, temperature=0)["choices"][0]["text"] == greedy


def test_a_draft_model_that_does_not_fit_is_refused(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before requests are taken, in one line; options that do not go together as well."""
    larger = llama_draft(tmp_path / "larger", vocab_size=300)
    other = llama_draft(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 257, "content": "<more>"})
    (other / "tokenizer.json").write_text(json.dumps(content))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    good = drafted_by(llama_draft(tmp_path / "good"))
    capsys.readouterr()
    for arguments, words in (
        (drafted_by(larger), f"--draft-model {larger} has a vocabulary of 300, the model one of"),
        (drafted_by(other), f"--draft-model {other} has another tokenizer than the model, so its"),
        (drafted_by(nothing), f"{nothing / 'config.json'} does not exist; give a folder with a"),
        (drafted_by(tmp_path / "absent"), f"{tmp_path / 'absent' / 'config.json'} does not exis"),
        (["--drafts", "2"], "--drafts 2 is of a --draft-model, and none is given; heads draft"),
        ([*good, "--drafts", "65"], "--drafts 65 must be from 1 to 64; the default is 4"),
        ([*good, "--heads", "2"], "--draft-model drafts instead of the heads, so it goes without"),
        ([*good, "--heads", "auto"], "--draft-model drafts instead of the heads, so it goes with"),
    ):
        assert main([str(export), "--port", "0", *arguments]) == EXIT_USER_ERROR
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {words}")
        assert captured.err.count("\n") == 1
