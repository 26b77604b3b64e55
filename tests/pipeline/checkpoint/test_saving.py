"""Saves in flight: what training changes meanwhile is not in them, and all ranks end them alike."""

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.checkpoint.file_names import FOLDER, WEIGHTS, committed, step_of
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.sharded_tensors import Snapshot
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.run_config import load_config
from pipeline.distributed.agreement import RankFlags, agree
from tests.support.checkpoint_cases import LAYOUT
from tests.support.harness import run_ranks

KEY = "weight/x@0"


class _Held:
    """What holds a rank's thread back until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self) -> None:
        assert self.go.wait(30)


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


def _saver(
    config_path: Path,
    tmp_path: Path,
    missing: Callable[[Path], list[str]] | None = lambda _: [],
) -> tuple[Saver, TrainState, int]:
    """The tensors of these tests are not a model's, so by default nothing is missing."""
    config = load_config(config_path, [f"run.dir={tmp_path / 'run'}"])
    folder = CheckpointFolder(config.run.dir, config.checkpoint)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    state = TrainState(step=3, data_fingerprint="", data_seed=0, sequence_length=16, layout=LAYOUT)
    saver = Saver(folder, config, torch.device("cpu"), tokenizer, 0, missing=missing)
    return saver, state, int(os.environ["RANK"])


def _advance(saver: Saver) -> None:
    """What the loop does after a step: the flags of all ranks, then the next part of the save."""
    flags = RankFlags(save_done=saver.is_done)
    saver.advance(all_done=agree(torch.tensor(True), flags).save_done)


def _train_on(config_path: Path, tmp_path: Path) -> dict[str, Any]:
    """One save held up on rank 1 while training goes on; then the next is due."""
    saver, state, rank = _saver(config_path, tmp_path)
    log = _Lines()
    logger = logging.getLogger("pipeline.checkpoint.saving")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    live = torch.full((10,), float(rank))
    snapshot = Snapshot(rank, 0, 1, 3, {KEY: live})
    held = _Held()
    saver.begin(
        state, lambda: snapshot, asynchronous=True, beside=held if rank == 1 else lambda: None
    )
    live += 100
    state.advance(samples=4, applied=True)
    committed_meanwhile = []
    for _ in range(5):
        _advance(saver)
        committed_meanwhile.append(saver.saved_step)
    if rank == 1:
        threading.Timer(0.2, held.go.set).start()
    saver.begin(state, lambda: snapshot, asynchronous=True)
    figures = saver.figures()
    first = saver.saved_step
    saver.finish()
    saver.close()
    return {
        "meanwhile": committed_meanwhile,
        "saved": (first, saver.saved_step),
        "figures": figures,
        "lines": log.lines,
    }


def test_training_goes_on_while_a_save_is_in_flight(config: Path, tmp_path: Path) -> None:
    """No rank commits while one writes; the next save waits; files hold what was at their step."""
    for result in run_ranks(2, _train_on, config, tmp_path):
        assert result["meanwhile"] == [None] * 5
        assert result["saved"] == (3, 4)
        stall_s, total_s = (result["figures"][f"save_{name}_s"] for name in ("stall", "total"))
        assert 0 < stall_s <= total_s
        assert "waiting for the save of step 3: step 4 is due to be saved" in result["lines"]
    three, four = committed(tmp_path / "run" / FOLDER)
    for rank in range(2):
        name = f"rank_{rank:05d}.safetensors"
        assert load_file(three / WEIGHTS / name)[KEY].tolist() == [rank] * 10
        assert load_file(four / WEIGHTS / name)[KEY].tolist() == [rank + 100] * 10


def _fail_on_one(config_path: Path, tmp_path: Path) -> tuple[int | None, dict[str, Any], list[str]]:
    saver, state, rank = _saver(config_path, tmp_path)
    log = _Lines()
    logging.getLogger("pipeline.checkpoint.saving").addHandler(log)
    snapshot = Snapshot(rank, 0, 1, 3, {KEY: torch.zeros(4)})

    def broken() -> None:
        raise RuntimeError("the storage is on strike\nin many words")

    saver.begin(
        state, lambda: snapshot, asynchronous=True, beside=broken if rank == 1 else lambda: None
    )
    saver.finish()
    failed = saver.saved_step, saver.figures(), log.lines
    saver.begin(state, lambda: snapshot, asynchronous=True)
    saver.finish()
    return failed if saver.saved_step == 3 else (3, {}, ["did not recover"])


def test_an_error_in_a_thread_fails_the_save_on_all_ranks(config: Path, tmp_path: Path) -> None:
    """Both say why and whose it was; nothing is left of it, and the same step can be saved then."""
    for saved, figures, lines in run_ranks(2, _fail_on_one, config, tmp_path):
        assert saved is None
        assert figures == {"save_failed": 1}
        assert "rank 1: RuntimeError: the storage is on strike (" in lines[-1]
        assert "saves again at step 6" in lines[-1]
    assert [step_of(path) for path in committed(tmp_path / "run" / FOLDER)] == [3]
    assert not list((tmp_path / "run" / FOLDER).glob("*.partial"))


def _same(snapshot: Snapshot) -> Snapshot:
    return snapshot


def _save_what_is_no_model(config_path: Path, tmp_path: Path) -> tuple[Any, dict[str, Any], str]:
    """A checkpoint that counts, then one whose files lack nearly everything of the model."""
    log = _Lines()
    logging.getLogger("pipeline.checkpoint.saving").addHandler(log)
    nothing: Callable[[Path], list[str]] = lambda _: []  # noqa: E731
    for missing in (nothing, None):  # None: what the configuration asks for
        saver, state, rank = _saver(config_path, tmp_path, missing)
        state.step = 3 if missing else 6
        snapshot = Snapshot(rank, 0, 1, 3, {KEY: torch.zeros(4)})
        saver.begin(state, functools.partial(_same, snapshot), asynchronous=True)
        saver.finish()
    return saver.saved_step, saver.figures(), log.lines[-1]


def test_files_that_are_not_the_whole_model_are_no_checkpoint(config: Path, tmp_path: Path) -> None:
    """Were the optimizer's states not found, the save would fail, and the one before would stay."""
    for saved, figures, line in run_ranks(2, _save_what_is_no_model, config, tmp_path):
        assert saved is None
        assert figures == {"save_failed": 1}
        assert "the files are not the whole model: weight of trunk.embedding.weight" in line
        assert "is missing elements 0 to" in line
    assert [step_of(path) for path in committed(tmp_path / "run" / FOLDER)] == [3]


def _finish_half(config_path: Path, tmp_path: Path) -> tuple[int | None, int | None]:
    """`latest` cannot be written at first, then it can."""
    saver, state, rank = _saver(config_path, tmp_path)
    obstacle = tmp_path / "run" / FOLDER / "latest.partial" / "in the way"
    if rank == 0:
        obstacle.mkdir(parents=True)
    snapshot = Snapshot(rank, 0, 1, 3, {KEY: torch.zeros(4)})
    saved = []
    for _ in range(2):
        saver.begin(state, lambda: snapshot, asynchronous=False)
        saver.finish()
        saved.append(saver.saved_step)
        if rank == 0 and obstacle.exists():
            obstacle.rmdir()
            obstacle.parent.rmdir()
    return saved[0], saved[1]


def test_a_checkpoint_whose_latest_failed_is_taken_up(config: Path, tmp_path: Path) -> None:
    """It has failed, so nothing was deleted for it; saved again, it is what it was."""
    assert run_ranks(2, _finish_half, config, tmp_path) == [(None, 3), (None, 3)]
    assert (tmp_path / "run" / FOLDER / "latest").read_text() == "step_00000003\n"
