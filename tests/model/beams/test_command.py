"""Beams of the command that generates text: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest

from foundation.command_line import EXIT_USER_ERROR
from model.beams.hypotheses import BeamSettings
from model.beams.search import beam_search
from model.generate import main
from model.inference.loading import load_network
from tests.support.tiny_export import export_tiny


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with four heads."""
    directory = tmp_path_factory.mktemp("beams") / "export"
    export_tiny(directory)
    return directory


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def printed_ids(text: str) -> list[list[int]]:
    """The lines that --ids adds."""
    return [list(map(int, line.split()[1:])) for line in text.splitlines() if line[:4] == "ids:"]


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
    assert re.search(r"by head 1: -\d+\.\d{4}\n  18 layers of 3\.00 beams, 1\.00 layers per", out)


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


BEAM = ["--decoder", "beam"]


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
