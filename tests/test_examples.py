"""Every example runs as its README says: one after the other, each on what the others have left."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.tokenization.tokenizer import bytes_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
LONGEST = 80


def _run(folder: Path, *command: str, **variables: str) -> str:
    """What an example prints, run in `folder` as somebody would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _python(folder: Path, name: str, *arguments: str) -> str:
    return _run(folder, sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run; the first one has made its shards there."""
    folder = tmp_path_factory.mktemp("examples")
    said = _python(folder, "tokenize_corpus.py")
    assert re.search(r"\d+ documents, [\d,]+ tokens to train on\n", said)
    first = sorted((ROOT / "pipeline").glob("*.py"))[0]
    assert said.splitlines()[-1] in first.read_text(encoding="utf-8"), "it read a document back"
    return folder


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """The run of the training example, a few steps long, with what it printed beside it."""
    script = str(ROOT / "examples" / "train_tiny.sh")
    said = _run(folder, "bash", script, "log.tensorboard=false", PYTHON=sys.executable, STEPS="4")
    (folder / "said.txt").write_text(said, encoding="utf-8")
    return folder / "runs" / "examples" / "run"


def test_each_is_short_and_listed() -> None:
    """README.md has a line for each file and no other; none is longer than a page or two."""
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+\.\w+)` \|", readme, re.MULTILINE)) == {f.name for f in FILES}
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines >= LONGEST} == {}


def test_batches_are_the_same_by_every_way(folder: Path) -> None:
    """The example holds its own claim: it compares what it read."""
    said = _python(folder, "read_batches.py")
    assert "labels [4, 8, 64]" in said
    assert said.endswith(
        "step 5 has the same samples: walked to, jumped to, and read by two ranks\n"
    )


def test_training_resumes_where_it_stopped(run_dir: Path) -> None:
    """The second command takes the first one's checkpoint and ends the run."""
    said = (run_dir.parents[2] / "said.txt").read_text(encoding="utf-8")
    assert "done at step 2 of 4" in said
    assert re.search(r"resumed from runs/examples/run/checkpoints/step_00000002: step 2", said)
    assert "done at step 4 of 4" in said


def test_a_checkpoint_is_read(run_dir: Path) -> None:
    """Every parameter of the run's newest checkpoint is printed with its size."""
    said = _python(run_dir.parents[2], "inspect_checkpoint.py")
    assert "checkpoints/step_00000004: step 4, 2,048 tokens\n" in said
    assert re.search(r"1024 x 64  root mean square 0\.\d+|1024 x 64  root mean square 1\.\d+", said)
    assert len(re.findall(r"root mean square", said)) > 6 * 5


def test_llama_cpp_is_told_how_our_tokenizers_split_text() -> None:
    """Those of `train:V` and `bytes` have a name there; others are left to its converter."""
    name = runpy.run_path(str(ROOT / "examples" / "to_llama_cpp.py"))["pre_tokenizer"]
    trained = json.loads(train_tokenizer(["some words, some more words\n"] * 9, 270))
    assert trained["model"]["merges"]
    assert name(trained) == "dbrx"
    assert name(json.loads(bytes_tokenizer())) == "gpt-2"
    trained["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    assert name(trained) is None


@pytest.mark.stress
def test_heads_generate_the_same_text(run_dir: Path) -> None:
    """The example compares the texts itself; each number of heads has its line."""
    said = _python(run_dir.parents[2], "generate_with_heads.py", "--new-tokens", "12")
    assert "every tensor is the checkpoint's" in said
    for heads in range(1, 5):
        (mean,) = re.findall(
            rf"^{heads} of 4 heads: ([\d.]+) tokens per forward", said, re.MULTILINE
        )
        assert 1 <= float(mean) <= heads
    assert "\ndef main(" in said
