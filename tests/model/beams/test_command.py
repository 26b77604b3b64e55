"""Beams of the command that generates text: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch

from foundation.command_line import EXIT_USER_ERROR
from model.beams.hypotheses import BeamSettings, BeamText, Following
from model.beams.search import beam_search
from model.decoding.stopping import StopStrings
from model.generate import main
from model.inference.loading import load_network
from tests.support.tiny_export import export_tiny
from tests.support.written_texts import output, printed_ids


def test_it_prints_the_best_beams(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt's text is that of its best beam; statistics say what was done."""
    arguments = [str(export), "--prompt", "ab", "--prompt", "é", "--max-new-tokens", "9", "--ids"]
    out = output(capsys, *arguments, "--decoder", "beam", "--beam-width", "3", "--stats")
    loaded = load_network(export)
    prompts = [loaded.tokenizer.encode(text).ids for text in ("ab", "é")]
    settings = BeamSettings(3, 9, eos_ids=loaded.eos_ids)
    assert printed_ids(out) == beam_search(loaded.network, prompts, settings).tokens
    assert out.startswith("ab")
    assert re.search(r"^3 beams: 18 tokens, 9 forwards, [\d.]+ tokens/s$", out, re.M)
    assert re.search(
        r"by head 1: -\d+\.\d{4}\n  18 layers of 3\.00 beams, widths up to 3; 1\.00 layers", out
    )


def test_drawn_beams_repeat_with_their_seed(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed prints the same tokens, another seed others; with replacement or without."""
    for way in ([], ["--distinct-beams"]):
        one, again, other = (
            printed_ids(
                output(
                    capsys,
                    *[str(export), "--prompt", "ab", "--decoder", "beam", "--ids", *way],
                    *["--temperature", "1.5", "--top-k", "20", "--seed", seed],
                )
            )
            for seed in ("1", "1", "2")
        )
        assert one == again != other


def test_drafted_beams_by_heads_and_by_a_model(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both draft; what the model drafts for itself is all kept, in as few forwards as can be."""
    arguments = [str(export), "--prompt", "ab", "--prompt", "é", "--max-new-tokens", "9", "--ids"]
    arguments += [*DSBD, "--beam-width", "3", "--stats", "--min-width", "3"]
    by_heads = output(capsys, *arguments)
    assert re.search(r"^3 beams, drafted by heads: \d+ tokens, \d+ forwards", by_heads, re.M)
    assert "forwards of the draft model: 0" in by_heads
    two = output(capsys, *arguments, "--heads", "2")
    assert "drafts of layer 1" in two
    assert "drafts of layer 2" not in two
    own = output(capsys, *arguments, "--draft", str(export), "--drafts", "3")
    # The prompt's layer, two forwards of four layers each.
    assert re.search(r"^3 beams, drafted by a draft model: 18 tokens, 3 forwards", own, re.M)
    assert "18 layers of 3.00 beams, widths up to 3; 4.00 layers per forward" in own
    assert "forwards of the draft model: 7" in own
    assert (
        re.findall(r"drafts of layer \d: kept (\d+) of (\d+) \(100%\)", own) == [("12", "12")] * 3
    )
    one = output(capsys, *arguments[:-2], "--draft", str(export), "--one-beam")
    assert re.search(r"drafted by a draft model: \d+ tokens, \d+ forwards", one)


def test_somebody_has_to_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with head 1 alone needs a second one."""
    directory = tmp_path / "export"
    export_tiny(directory, future_tokens=1)
    assert main([str(directory), "--prompt", "ab", *DSBD]) == EXIT_USER_ERROR
    assert "--decoder dsbd needs a drafter" in capsys.readouterr().err
    output(capsys, str(directory), "--prompt", "ab", *DSBD, "--draft-model", str(directory))


BEAM = ["--decoder", "beam"]
DSBD = ["--decoder", "dsbd"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--beam-width", "2"], "--beam-width is of beams, and --decoder asks for none"),
        (["--length-penalty", "2"], "--length-penalty is of beams, and --decoder asks for none"),
        ([*BEAM, "--beam-width", "0"], "--beam-width 0 must be from 1 to 64"),
        ([*BEAM, "--length-penalty", "nan"], "--length-penalty nan must be from -10 to 10"),
        ([*BEAM, "--distinct-beams"], "--distinct-beams is of beams that are drawn"),
        ([*BEAM, "--heads", "2"], "--heads does not go with --decoder beam"),
        ([*BEAM, "--compare"], "--compare does not go with --decoder beam"),
        ([*BEAM, "--stream"], "--stream does not go with --decoder beam"),
        ([*BEAM, "--draft-model", "x"], "--draft-model does not go with --decoder beam"),
        ([*BEAM, "--drafts", "2"], "--drafts 2 is of a --draft-model"),
        ([*BEAM, "--min-width", "2"], "--min-width is of beams that are drafted"),
        (["--width-threshold", "0.5"], "--width-threshold is of beams that are drafted"),
        (
            [*DSBD, "--temperature", "0"],
            "--decoder dsbd draws beams, and at temperature 0 there is nothing to draw",
        ),
        ([*DSBD, "--width-threshold", "2"], "--width-threshold 2 must be from 0 to 1"),
        ([*DSBD, "--min-width", "5"], "--min-width 5 must be from 1 to --beam-width 4"),
        ([*DSBD, "--heads", "1"], "--heads does not go with --decoder dsbd"),
        ([*DSBD, "--heads", "auto"], "--heads does not go with --decoder dsbd"),
        (["--decoder", "mtad", "--min-width", "2"], "--min-width does not go with --decoder mtad"),
        ([*DSBD, "--tree", "1"], "--tree does not go with --decoder dsbd"),
        ([*BEAM, "--repetition-penalty", "2"], "--repetition-penalty does not go with --decoder"),
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


def test_stop_strings_do_not_use_up_the_beams(export: Path) -> None:
    """However many of the likeliest tokens complete one, W others go on."""
    tokenizer = load_network(export).tokenizer
    ending = "abcdefghijklmnop"
    text = BeamText(BeamSettings(2, 8, stop=StopStrings(tokenizer, list(ending))))
    logits = torch.zeros(1, tokenizer.get_vocab_size())
    logits[0, tokenizer.encode("y" + ending + "z").ids] = torch.tensor([4.0, *[3.0] * 16, 2.0])
    said = logits.log_softmax(-1)
    assert text.grow_best(Following(said, said).layer([0.0])) == [0, 0]
    assert [tokenizer.decode(beam.tokens) for beam in text.live] == ["y", "z"]
