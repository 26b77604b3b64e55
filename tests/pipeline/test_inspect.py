"""`python -m pipeline.inspect` shows what a checkpoint holds, and whether it is whole."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.file_names import FOLDER, step_folder
from pipeline.config.sections import CheckpointSection
from pipeline.inspect import main
from tests.support.checkpoint_cases import commit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three checkpoints, the second the best."""
    options = CheckpointSection(every_steps=2, keep=3)
    for step, loss in ((2, 3.0), (4, 2.5), (6, 2.75)):
        commit(tmp_path / "run", step, options, eval_loss=loss)
    return tmp_path / "run"


def test_a_run_is_listed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All checkpoints with size and loss; which is latest, best, partial or set aside."""
    (run_dir / FOLDER / "step_00000008.partial").mkdir()
    (run_dir / FOLDER / "superseded_step_00000010").mkdir()
    assert main([str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run_dir / FOLDER}: 3 checkpoints"
    assert lines[1].split(maxsplit=1)[0] == "step_00000002"
    assert lines[1].endswith("validation loss 3.0000")
    assert lines[2].endswith("validation loss 2.5000, best")
    assert lines[3].endswith("validation loss 2.7500, latest")
    assert "never used" in lines[4]
    assert "may be deleted" in lines[5]
    assert f"checkpoint    {step_folder(run_dir / FOLDER, 6)}" in lines


def test_a_checkpoint_is_described(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step, tokens, data position, layout, sizes and health."""
    assert main([str(step_folder(run_dir / FOLDER, 4))]) == 0
    text = capsys.readouterr().out
    for words in (
        "step          4, of which 0 were skipped",
        "tokens        4,000",
        "next sample 40 of sequences of 100 tokens, seed 3, shard set abc",
        "2 ranks = 2 data x 1 tensor x 1 stages, ZeRO 3, fp32",
        "validation    loss 2.500000",
        "2 of ranks",
        "whole (sizes; --verify reads every file)",
    ):
        assert words in text


def test_verify_reads_every_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit is found with --verify only, in any checkpoint of a run; exit code 1."""
    assert main([str(run_dir), "--verify"]) == 0
    assert "whole (every checksum)" in capsys.readouterr().out
    path = step_folder(run_dir / FOLDER, 2) / "tensors" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main([str(run_dir)]) == 0
    capsys.readouterr()
    assert main([str(run_dir), "--verify"]) == 1
    assert "DAMAGED: tensors/rank_00001.safetensors differs" in capsys.readouterr().out
    path.unlink()
    assert main([str(path.parents[1])]) == 1
    assert "DAMAGED: tensors/rank_00001.safetensors is missing" in capsys.readouterr().out


def test_what_cannot_be_read_is_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a readable state or manifest the rest is still shown."""
    checkpoint = step_folder(run_dir / FOLDER, 6)
    (checkpoint / "state.json").write_text("{")
    (checkpoint / "manifest.json").write_text("[]")
    assert main([str(checkpoint)]) == 1
    assert "DAMAGED: manifest.json is damaged" in capsys.readouterr().out
    assert main([str(run_dir)]) == 1


def test_no_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a checkpoint")


def test_it_needs_no_torch(run_dir: Path) -> None:
    """It starts in no time on any machine: torch is not imported."""
    code = "import sys; from pipeline.inspect import main; main(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(run_dir), "--verify"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
