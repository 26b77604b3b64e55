"""The command that generates text: what it prints, and what it refuses."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from foundation.command_line import EXIT_USER_ERROR
from model.generate import main
from model.hugging_face.folder import read_record
from pipeline.exporting.writing import write_record
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, describe, export_tiny
from tests.support.tiny_llama import save_llama
from tests.support.tiny_model import greedy_continuation, tiny_config, tiny_model
from tests.support.written_texts import output, printed_ids


def expected_ids(prompt: list[int], num_tokens: int) -> list[int]:
    """Plain greedy continuation, up to the end of text."""
    model = tiny_model(tiny_config(vocab_size=VOCABULARY), dtype=torch.float32)
    tokens = greedy_continuation(model, prompt, num_tokens)
    return tokens[: tokens.index(256) + 1] if 256 in tokens else tokens


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
        (["--temperature", "1", "--top-k", "-1"], "--top-k -1 must be at least 0"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0 must be above 0 and at most 1"),
        (["--temperature", "1", "--min-p", "2"], "--min-p 2 must be from 0 to 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0 must be from 0.001 to 1,000"),
        (["--top-p", "0.5"], "--top-p has no effect at temperature 0"),
        (["--stop", ""], "--stop is empty"),
        (["--lossy", "top-1"], "--lossy top-1 is no rule; give typical, or top-K"),
        (["--lossy", "typical", "--compare"], "--lossy gives another text than head 1 alone"),
        (["--tree", "9"], "--tree 9 must be from 0 to 8"),
        (["--stream", "--prompt", "b"], "--stream shows one text as it comes, not 2 prompts"),
        (["--prompt-file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
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
    """Going past the positions the model was trained on is allowed and said, by prompts, too."""
    for length in (60, 64, 90):
        assert main([str(export), "--prompt", "x" * length, "--max-new-tokens", "9", "--ids"]) == 0
        captured = capsys.readouterr()
        said = f"note: a prompt of {length} tokens and 9 new ones may pass position 64"
        assert said in captured.err
        prompt = Tokenizer.from_buffer(byte_tokenizer()).encode("x" * length).ids
        assert printed_ids(captured.out) == [expected_ids(prompt, 9)]


@pytest.mark.parametrize("options", [[], ["--temperature", "1.5", "--seed", "3"]])
def test_streamed_text_is_the_same(
    export: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """Printed as it comes or at the end, the text is one; characters are whole."""
    arguments = [str(export), "--prompt", "naïve é", "--max-new-tokens", "50", "--ids", *options]
    at_once = output(capsys, *arguments).split("---")[0]
    streamed = output(capsys, *arguments, "--stream").split("---")[0]
    assert streamed == at_once
    assert len(printed_ids(at_once)[0]) > 3


def test_a_stop_string_ends_the_text(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text goes up to it, shown at once or streamed; tokens end with the one that made it."""
    arguments = [str(export), "--prompt", "ab", "--max-new-tokens", "40", "--ids"]
    [whole] = printed_ids(output(capsys, *arguments))
    tokenizer = Tokenizer.from_buffer(byte_tokenizer())
    text = tokenizer.decode(whole)
    place = next(i for i in range(3, 30) if text[i : i + 2].isascii() and text[i : i + 2].strip())
    stop = text[place : place + 2]
    for more in ([], ["--stream"], ["--heads", "1"]):
        out = output(capsys, *arguments, "--stop", stop, *more)
        assert out.splitlines(keepends=False)[0].split("\n")[0] in "ab" + text
        [ids] = printed_ids(out)
        assert ids == whole[: len(ids)]
        assert stop in tokenizer.decode(ids)
        assert stop not in tokenizer.decode(ids[:-1])
        assert out.split("\nids:")[0] == "ab" + text[: text.index(stop)]


def test_a_prompt_may_come_from_a_file_or_stdin(
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They continue as the same text in an option; bytes that are no text are refused."""
    expected = output(capsys, str(export), "--prompt", "é=1\n", "--ids").split("\n1 head")[0]
    path = tmp_path / "prompt.txt"
    path.write_bytes("é=1\n".encode())
    ids = printed_ids(expected)
    assert printed_ids(output(capsys, str(export), "--prompt-file", str(path), "--ids")) == ids
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é=1\n".encode())))
    assert printed_ids(output(capsys, str(export), "--prompt-file", "-", "--ids")) == ids
    path.write_bytes(b"\xff\xfe")
    assert main([str(export), "--prompt-file", str(path)]) == EXIT_USER_ERROR
    assert "prompt 1 is not UTF-8 text" in capsys.readouterr().err


def test_a_tree_prints_the_same_text(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its outputs are equal to those of one head, in no more forwards than a chain takes."""
    arguments = [str(export), "--prompt", "ab", "--prompt", "d", "--max-new-tokens", "30"]
    chain = output(capsys, *arguments, "--compare", "--ids")
    tree = output(capsys, *arguments, "--compare", "--ids", "--tree", "3")
    assert printed_ids(tree) == printed_ids(chain)
    assert "outputs are equal" in tree
    forwards = [int(re.findall(r"4 heads: \d+ tokens, (\d+)", out)[0]) for out in (chain, tree)]
    assert forwards[1] <= forwards[0]


def test_a_tree_samples_by_its_seed(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text repeats with its seed, another seed gives another; a penalty is compared, too."""
    arguments = [str(export), "--prompt", "ab", "--max-new-tokens", "30", "--ids", "--tree", "2"]
    one, again, other = (
        printed_ids(output(capsys, *arguments, "--temperature", "1", "--seed", seed))
        for seed in ("1", "1", "2")
    )
    assert one == again != other
    penalized = output(capsys, *arguments, "--compare", "--repetition-penalty", "1.5")
    assert "outputs are equal" in penalized


@pytest.mark.parametrize("rule", ["top-30", "typical"])
def test_a_lossy_rule_keeps_more_drafts(
    export: Path, capsys: pytest.CaptureFixture[str], rule: str
) -> None:
    """Fewer forwards, and tokens that head 1 finds less likely."""
    arguments = [str(export), "--prompt", "ab", "--max-new-tokens", "60", "--stats"]
    pattern = r"(\d+) forwards.*head 1: (-\d+\.\d+)"
    found = [
        re.findall(pattern, output(capsys, *arguments, *more), re.S)[0]
        for more in ([], ["--lossy", rule])
    ]
    assert int(found[1][0]) <= int(found[0][0])
    if rule == "top-30":
        assert int(found[1][0]) < int(found[0][0])
        assert float(found[1][1]) < float(found[0][1])


def test_no_prompt_is_refused(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As any other mistake of usage is."""
    with pytest.raises(SystemExit, match="2"):
        main([str(export)])
    assert "one of --prompt and --prompt-file is required" in capsys.readouterr().err


def test_statistics_add_up(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drafts that were kept are the tokens that no forward of their own gave."""
    out = output(
        capsys, str(export), "--prompt", "ab", "--max-new-tokens", "40", "--stats", "--compare"
    )
    kept = [int(n) for n in re.findall(r"draft of head \d: kept (\d+) of \d+ times", out)]
    tokens, forwards = map(int, re.findall(r"4 heads: (\d+) tokens, (\d+) forwards", out)[0])
    assert len(kept) == 3
    assert sum(kept) == tokens - forwards
    means = re.findall(r"mean logarithmic probability of a token, by head 1: (-\d+\.\d+)", out)
    assert len(means) == 2
    assert len(set(means)) == 1
    assert len(re.findall(r"first token after [\d.]+ ms, then [\d.]+ ms per forward", out)) == 2


def draft_model(directory: Path) -> Path:
    """A plain Llama of the export's vocabulary, as transformers saves it, with its tokenizer."""
    save_llama(directory, num_hidden_layers=2)
    (directory / "tokenizer.json").write_bytes(byte_tokenizer())
    return directory


@pytest.mark.parametrize("kind", ["plain Llama", "itself"])
def test_a_second_model_may_draft(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Texts are those of head 1, whoever drafts; the model's own drafts are all kept."""
    drafter = export if kind == "itself" else draft_model(tmp_path / "small")
    arguments = [str(export), "--prompt", "ab", "--prompt", "d", "--max-new-tokens", "31", "--ids"]
    plain = printed_ids(output(capsys, *arguments, "--heads", "1"))
    more = ["--draft-model", str(drafter), "--drafts", "3", "--compare", "--stats"]
    out = output(capsys, *arguments, *more)
    assert printed_ids(out) == plain
    assert "outputs are equal" in out
    forwards = int(re.findall(r"draft model, 3 drafts: 62 tokens, (\d+) forwards", out)[0])
    assert re.search(r"^  draft 3: kept \d+ of \d+ times", out, re.M)
    assert forwards == 9 if kind == "itself" else forwards > 9


def test_a_draft_model_that_does_not_fit_is_refused(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another vocabulary, another tokenizer, none at all, or options of the heads."""
    drafter = draft_model(tmp_path / "small")

    def refusal(*options: str) -> str:
        assert main([str(export), "--prompt", "ab", *options]) == EXIT_USER_ERROR
        return capsys.readouterr().err

    asked = ("--draft-model", str(drafter))
    assert "--draft-model drafts instead of the heads" in refusal(*asked, "--heads", "2")
    assert "--drafts 0 must be from 1 to 64" in refusal(*asked, "--drafts", "0")
    assert "--drafts 2 is of a --draft-model" in refusal("--drafts", "2")
    save_llama(drafter, num_hidden_layers=2, vocab_size=300)
    assert "has a vocabulary of 300, the model one of 260" in refusal(*asked)
    other = Tokenizer.from_buffer(byte_tokenizer())
    other.add_tokens(["more"])
    other.save(str(drafter / "tokenizer.json"))
    assert "has another tokenizer than the model" in refusal(*asked)
    (drafter / "tokenizer.json").unlink()
    assert "is not a readable tokenizer.json" in refusal(*asked)


def test_every_end_of_text_of_generation_config_ends_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An imported model's list of them, beside the token that ended documents here."""
    export_tiny(tmp_path / "export")
    arguments = [str(tmp_path / "export"), "--prompt", "ab", "--max-new-tokens", "40", "--ids"]
    [whole] = printed_ids(output(capsys, *arguments))
    ends = [whole[9], whole[5]]
    path = tmp_path / "export" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    (tmp_path / "export" / "headway.json").unlink()
    write_record(tmp_path / "export", describe(tiny_config(vocab_size=VOCABULARY)))
    [found] = printed_ids(output(capsys, *arguments))
    first = next(place for place, token in enumerate(whole) if token in ends)
    assert found == whole[: first + 1]
    assert first < 9
