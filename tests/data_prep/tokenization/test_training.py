"""Training a tokenizer: on any text in time, with signs of life, and not deaf to Ctrl-C."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest
from data_prep.tokenization.tokenizer import Tokenizer, train_tokenizer
from data_prep.tokenization.training import LONGEST_RUN, cut_runs, train_watched

SCRIPT = Path(__file__).parents[3] / "data_prep" / "shard.py"
PIECES = st.sampled_from(
    ["a", "数", "\u0301", "_", "=", " ", "\n", "7", "x" * 1024, "=" * 1023, " " * 1025, "\t" * 1024]
)


@settings(deadline=None, max_examples=100)
@given(pieces=st.lists(PIECES, max_size=12))
def test_runs_are_cut_and_nothing_is_lost(pieces: list[str]) -> None:
    """The parts make up the text, none has a run of one kind above the limit."""
    text = "".join(pieces)
    parts = list(cut_runs(text))
    assert "".join(parts) == text
    for part in parts:
        for is_kind in (str.isalpha, str.isspace, lambda sign: sign in "_="):
            longest = max(map(len, "".join(s if is_kind(s) else "0" for s in part).split("0")))
            assert longest <= LONGEST_RUN


def test_usual_texts_train_the_same_tokenizer() -> None:
    """Source code and prose are trained on as they are, so the file has the same bytes."""
    texts = [path.read_text("utf-8") for path in sorted(SCRIPT.parent.rglob("*.py"))[:12]]
    texts += ["数据" * 500, "=" * LONGEST_RUN, " " * 40]
    assert [part for text in texts for part in cut_runs(text)] == texts
    assert train_watched(texts, 400, print) == train_tokenizer(texts, 400)


def test_a_megabyte_of_one_word_is_learned_in_time() -> None:
    """It took minutes: each joined pair moved all letters behind it."""
    genome = "".join(random.Random(1).choices("ACGT", k=1_000_000))
    started_s = time.process_time()
    content = train_watched([genome], 600, print)
    assert time.process_time() - started_s < 30
    assert Tokenizer(content, None, "").vocab_size == 600


def test_errors_of_the_texts_come_through() -> None:
    """An input that cannot be read ends training with its own message."""

    def texts() -> Iterator[str]:
        yield "some text"
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        train_watched(texts(), 300, print)


def test_training_says_how_far_it_is() -> None:
    """Now and then a line, with the step, the text read and the time."""
    lines: list[str] = []

    def texts() -> Iterator[str]:
        for number in range(4):
            yield f"text {number}"
            time.sleep(0.2)

    train_watched(texts(), 300, lines.append, line_s=0.1)
    assert any(line.startswith("reading the sample: 0.0 million characters") for line in lines)


def test_a_vocabulary_that_the_input_does_not_fill_is_said(
    write_jsonl: Callable[..., Path],
    build_set: Callable[..., Manifest],
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever asks for ten million tokens and gets hundreds hears of it."""
    from data_prep.shard import main

    path = write_jsonl(texts)
    out = path.parent / "out"
    arguments = ["--input", str(path), "--output", str(out), "--tokenizer", "train:9999999"]
    assert main([*arguments, "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert "note: the input gives a vocabulary of " in said
    assert "tokens, not of 9,999,999" in said


def test_ctrl_c_ends_training(tmp_path: Path) -> None:
    """One line and exit status 130 within seconds, while the library learns."""
    rng = random.Random(5)
    words = ("".join(rng.choices("abcdefghijklmnop", k=9)) for _ in range(400_000))
    (tmp_path / "a.txt").write_text(" ".join(words))
    command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / "a.txt"), "--output"]
    command += [str(tmp_path / "out"), "--tokenizer", "train:60000"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a shell ignores Ctrl-C, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("training a tokenizer"):
                break
        time.sleep(2)  # the file is read by then
        process.send_signal(signal.SIGINT)
        sent_s = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert time.monotonic() - sent_s < 15
    assert rest.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in rest
