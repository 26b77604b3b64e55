"""Joint decoding by the command that generates text: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest

from foundation.command_line import EXIT_USER_ERROR
from model.decoding.generation import collect, generate, stream
from model.decoding.sampling import Sampling
from model.generate import main
from model.inference.loading import load_drafter, load_network
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.rule import PUBLISHED, JointRule
from model.serve import check, load, parse
from model.serve import main as serve
from tests.support.serving import running
from tests.support.tiny_export import export_tiny
from tests.support.written_texts import output, printed_ids

PROMPTS = ["--prompt", "ab", "--prompt", "é"]
MTAD = ["--decoder", "mtad", "--ids", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, of one head."""
    directory = tmp_path_factory.mktemp("joint") / "smaller"
    export_tiny(directory, layers=3, future_tokens=1)
    return directory


def test_heads_draft(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts are the decoder's with the published rule; the counts and the word lossy are there."""
    out = output(capsys, str(export), *PROMPTS, *MTAD, "--stats", "--tau", "0")
    loaded = load_network(export)
    prompts = [loaded.tokenizer.encode(text).ids for text in ("ab", "é")]
    rule = PUBLISHED._replace(threshold=0)
    way = JointDecoder(loaded.network, heads=4, rule=rule, eos_id=loaded.eos_ids)
    pieces = stream(way, prompts, max_new_tokens=12, eos_id=loaded.eos_ids)
    found = collect(pieces, 2)
    assert printed_ids(out) == found.tokens
    assert out.startswith("ab")
    assert re.search(r"^joint decoding \(lossy\), 4 beams of 4 heads: 24 tokens, 4 for", out, re.M)
    assert "  lossy: drafts are kept where P / Q > 0, of 1 candidate; up to 4 tokens per" in out
    assert "  forwards: 4 of the model, 0 of the draft model" in out
    assert "  draft of head 4: kept 4 of 6 times (67%)" in out
    assert "mean logarithmic probability" in out


def test_a_second_model_drafts(
    export: Path, smaller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By --draft; sampled texts repeat with their seed; several candidates are verified."""
    options = ["--draft", str(smaller), "--drafts", "3", "--beam-width", "5", "--candidates", "2"]
    drawn = ["--temperature", "1.2", "--top-p", "0.9", "--tau", "0.2", "--seed"]
    command = [str(export), *PROMPTS, *MTAD, *options, *drawn]
    out = output(capsys, *command, "3", "--stats")
    loaded = load_network(export)
    way = JointModelDecoder(
        loaded.network,
        drafter=load_drafter(smaller, loaded),
        drafts=3,
        rule=JointRule(5, 2, 0.2),
        eos_id=loaded.eos_ids,
        sampling=Sampling(temperature=1.2, top_p=0.9),
        seeds=[3, 4],
    )
    prompts = [loaded.tokenizer.encode(text).ids for text in ("ab", "é")]
    pieces = stream(way, prompts, max_new_tokens=12, eos_id=loaded.eos_ids)
    found = collect(pieces, 2)
    assert printed_ids(out) == found.tokens
    assert f"forwards: {found.forwards} of the model, {way.draft_forwards} of the draft" in out
    assert "(lossy), 5 beams of a draft model, 3 drafts: " in out
    assert "of 2 candidates" in out
    assert re.search(r"^  draft 3: kept \d+ of \d+ times", out, re.M)
    assert printed_ids(output(capsys, *command, "3")) == found.tokens
    assert printed_ids(output(capsys, *command, "30")) != found.tokens


def test_tau_1_prints_the_plain_text(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a text may be shown as it comes."""
    loaded = load_network(export)
    out = output(
        capsys, str(export), "--prompt", "ab", *MTAD, "--tau", "1", "--beam-width", "1", "--stream"
    )
    prompt = loaded.tokenizer.encode("ab").ids
    plain = generate(loaded.network, [prompt], heads=1, max_new_tokens=12, eos_id=loaded.eos_ids)
    assert printed_ids(out) == plain.tokens
    assert "1 beam of 4 heads: 12 tokens, 12 forwards, 1.00 tokens per forward" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tau", "0.5"], "--tau is of joint decoding; add --decoder mtad"),
        (["--candidates", "2"], "--candidates is of joint decoding; add --decoder mtad"),
        (["--decoder", "beam", "--tau", "0.5"], "--tau is of joint decoding"),
        ([*MTAD, "--tau", "nan"], "--tau nan must be from 0 to 1"),
        ([*MTAD, "--tau", "-0.1"], "--tau -0.1 must be from 0 to 1"),
        ([*MTAD, "--beam-width", "65"], "--beam-width 65 must be from 1 to 64; the default is 4"),
        ([*MTAD, "--candidates", "5"], "--candidates 5 must be from 1 to --beam-width 4"),
        ([*MTAD, "--heads", "1"], "of this export one head is used, which drafts nothing"),
        ([*MTAD, "--heads", "auto"], "--heads auto does not go with --decoder mtad"),
        ([*MTAD, "--tree", "1"], "--tree does not go with --decoder mtad"),
        ([*MTAD, "--lossy", "typical"], "--lossy does not go with --decoder mtad"),
        ([*MTAD, "--length-penalty", "1"], "--length-penalty does not go with --decoder mtad"),
        ([*MTAD, "--compare"], "--compare does not go with --decoder mtad"),
    ],
)
def test_wrong_combinations_are_refused(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """One line that names the option and the way out."""
    assert main([str(export), "--prompt", "ab", *arguments]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_one_head_needs_a_second_model(smaller: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has nothing that drafts; the message says what to give."""
    assert main([str(smaller), "--prompt", "ab", *MTAD]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert (
        "one head is used, which drafts nothing; use more heads, or give a second model by --draft"
        in err
    )
    assert err.count("\n") == 1


def test_a_server_decodes_so(export: Path) -> None:
    """Its texts are the decoder's, and the line that it begins with says that it is lossy."""
    rule = ["--decoder", "mtad", "--tau", "0", "--candidates", "2"]
    options = parse([str(export), *rule], "serve")
    check(options)
    assert load(options, 4)[1] == "4 heads, joint decoding, lossy"
    loaded = load_network(export)
    way = JointDecoder(
        loaded.network, heads=4, rule=JointRule(4, 2, 0), eos_id=loaded.eos_ids, logprobs=True
    )
    prompt = loaded.tokenizer.encode("ab").ids
    pieces = stream(way, [prompt], max_new_tokens=12, eos_id=loaded.eos_ids)
    [expected] = collect(pieces, 1).tokens
    with running(export, *rule) as server:
        given = server.client.completions.create(
            model="tiny", prompt="ab", max_tokens=12, temperature=0
        )
    text = [token for token in expected if token not in loaded.eos_ids]
    whole = loaded.tokenizer.decode(prompt + text)
    assert given.choices[0].text == whole.removeprefix("ab")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tau", "0.5"], "--tau is of joint decoding; add --decoder mtad"),
        (["--beam-width", "2"], "--beam-width is of joint decoding; add --decoder mtad"),
        (["--decoder", "mtad", "--tau", "2"], "--tau 2 must be from 0 to 1"),
        (["--decoder", "mtad", "--heads", "auto"], "--heads auto measures exact drafts"),
        (["--decoder", "mtad", "--heads", "1"], "one head is used, which drafts nothing"),
    ],
)
def test_a_server_refuses_the_same(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """Before it listens or loads the model."""
    assert serve([str(export), *arguments]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
