"""The command that generates text: what it prints, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.generate import EXIT_USER_ERROR, main
from model.hugging_face.folder import read_record
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, export_tiny
from tests.support.tiny_model import greedy_continuation, tiny_config, tiny_model


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with four heads."""
    directory = tmp_path_factory.mktemp("generate") / "export"
    export_tiny(directory)
    return directory


def expected_ids(prompt: list[int], num_tokens: int) -> list[int]:
    """Plain greedy continuation, up to the end of text."""
    model = tiny_model(tiny_config(vocab_size=VOCABULARY), dtype=torch.float32)
    tokens = greedy_continuation(model, prompt, num_tokens)
    return tokens[: tokens.index(256) + 1] if 256 in tokens else tokens


def printed_ids(text: str) -> list[list[int]]:
    """The lines that --ids adds."""
    return [list(map(int, line.split()[1:])) for line in text.splitlines() if line[:4] == "ids:"]


@pytest.mark.parametrize("heads", ["1", "3", None])
def test_it_prints_the_text_head_1_gives(
    export: Path, capsys: pytest.CaptureFixture[str], heads: str | None
) -> None:
    """Several prompts, an empty one among them, are continued as head 1 alone would."""
    options = [] if heads is None else ["--heads", heads]
    prompts = ["--prompt", "def f(x):", "--prompt", "", "--prompt", "é"]
    assert main([str(export), *prompts, "--max-new-tokens", "12", "--ids", *options]) == 0
    out = capsys.readouterr().out
    encode = Tokenizer.from_buffer(byte_tokenizer()).encode
    ids = [encode("def f(x):").ids, [256], encode("é").ids]
    assert printed_ids(out) == [expected_ids(prompt, 12) for prompt in ids]
    assert out.startswith("def f(x):")
    summary = re.search(
        r"(\d) heads?: (\d+) tokens, (\d+) forwards, ([\d.]+) tokens per forward, [\d.]+ tokens/s",
        out,
    )
    assert summary is not None
    assert summary[1] == (heads or "4")
    assert int(summary[2]) == sum(map(len, printed_ids(out)))
    assert 1 <= float(summary[4]) <= int(summary[1])


def test_compare_says_that_outputs_are_equal(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--compare runs one head and all of them, and reports equality and speed-up."""
    assert main([str(export), "--prompt", "ab", "--max-new-tokens", "16", "--compare"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^1 head: 16 tokens, 16 forwards, 1\.00 tokens per forward", out, re.M)
    assert re.search(r"^4 heads: 16 tokens", out, re.M)
    assert re.search(r"^outputs are equal, speed-up \d+\.\d\d$", out, re.M)


def test_sampling_repeats_with_its_seed(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed prints the same tokens, another seed others."""

    def sample(seed: str) -> list[list[int]]:
        arguments = ["--prompt", "ab", "--temperature", "1.2", "--seed", seed, "--ids"]
        assert main([str(export), *arguments]) == 0
        return printed_ids(capsys.readouterr().out)

    assert sample("1") == sample("1") != sample("2")


def test_bf16_runs(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The arithmetic can be chosen apart from what is stored."""
    assert main([str(export), "--prompt", "ab", "--dtype", "bf16", "--max-new-tokens", "4"]) == 0
    assert "4 tokens, " in capsys.readouterr().out
    assert read_record(export).description.dtype == "fp32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--heads", "5"], "--heads 5, but this export has 4; use 1 to 4"),
        (["--heads", "0"], "--heads 0 must be at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature -1 must be 0 or a positive number"),
        (["--temperature", "nan"], "--temperature nan must be 0 or a positive number"),
        (["--temperature", "1", "--compare"], "--compare needs --temperature 0"),
        (["--prompt", "x" * 64], "prompt 2 has 64 tokens, the model was trained on sequences of"),
    ],
)
def test_mistakes_are_one_line(
    export: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """A value out of range is named with its rule and what to do, and nothing is printed."""
    assert main([str(export), "--prompt", "ab", *arguments]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {words}")
    assert captured.err.count("\n") == 1


def test_a_folder_that_is_no_export_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder is named together with the command that makes one."""
    assert main([str(tmp_path / "nowhere"), "--prompt", "ab"]) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert "nowhere is not a folder" in err
    assert "pipeline.export" in err


def test_a_text_past_the_trained_length_is_noted(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Going past the positions the model was trained on is allowed and said."""
    assert main([str(export), "--prompt", "x" * 60, "--max-new-tokens", "9"]) == 0
    assert (
        "note: a prompt of 60 tokens and 9 new ones may pass position 64" in capsys.readouterr().err
    )
